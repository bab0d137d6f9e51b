//! From an RGB image to an encoder's input, as `preprocessor_config.json` says: resize, crop, rescale,
//! normalise, exactly as transformers' `CLIPImageProcessorPil`.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use super::decode::RgbImage;
use super::resize::{Filter, resize};
use crate::config::json::JsonObject;
use crate::{Result, ZooError};

/// An image processor.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    size: Size,
    /// Side of the square that is cut out of the middle, if one is.
    crop: Option<usize>,
    filter: Filter,
    /// For each channel, what a byte is multiplied with and what is then added.
    scale: [f32; 3],
    shift: [f32; 3],
    side: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// The shorter side becomes this long, the other in proportion.
    ShortestEdge(usize),
    /// Width and height.
    Exact([usize; 2]),
}

/// CLIP's means and standard deviations.
const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// Files that may hold the configuration; the second has it as an object.
const FILES: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];

impl ImageProcessor {
    /// Reads the processor of the checkpoint in `folder`, which must make images of `side` × `side` pixels.
    ///
    /// # Errors
    /// As [`crate::config::DecoderConfig::from_hf`].
    pub fn from_folder(folder: &Path, side: usize) -> Result<Self> {
        let path = folder.join(FILES[0]);
        if path.exists() {
            return Self::from_object(&JsonObject::read(&path)?, side);
        }
        let path = folder.join(FILES[1]);
        let json = JsonObject::read(&path)?;
        match json.object("image_processor")? {
            Some(object) => Self::from_object(&object, side),
            None => Err(json.malformed("image_processor is missing")),
        }
    }

    fn from_object(json: &JsonObject, side: usize) -> Result<Self> {
        let on = |key: &str| Ok::<_, ZooError>(json.get::<bool>(key)?.unwrap_or(true));
        if json.get::<bool>("do_pad")?.unwrap_or(false) {
            return Err(json.unsupported("do_pad", "padding"));
        }
        if !on("do_resize")? {
            return Err(json.unsupported("do_resize", "images that are not resized"));
        }
        let size = size(json)?;
        let crop = if on("do_center_crop")? { Some(crop(json, side)?) } else { None };
        let made = match (crop, size) {
            (Some(crop), Size::ShortestEdge(edge)) if crop <= edge => [crop; 2],
            (Some(crop), Size::Exact(exact)) if exact.iter().all(|&edge| crop <= edge) => [crop; 2],
            (None, Size::Exact(exact)) => exact,
            _ => return Err(json.unsupported("size", "images of many shapes, or a crop beyond the image")),
        };
        if made != [side; 2] {
            return Err(
                json.malformed(&format!("it makes images of {made:?} pixels, the encoder takes {side}"))
            );
        }
        let filter = match json.get::<u64>("resample")?.unwrap_or(3) {
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            other => return Err(json.unsupported("resample", &format!("filter {other}"))),
        };
        let factor = if on("do_rescale")? { json.get("rescale_factor")?.unwrap_or(1.0 / 255.0) } else { 1.0 };
        let (mean, std) = if on("do_normalize")? {
            (json.get("image_mean")?.unwrap_or(MEAN), json.get("image_std")?.unwrap_or(STD))
        } else {
            ([0.0; 3], [1.0; 3])
        };
        if std.iter().any(|&std| std <= 0.0) {
            return Err(json.malformed("image_std has a value that is not positive"));
        }
        let of_channels = |f: &dyn Fn(usize) -> f64| std::array::from_fn(|channel| f(channel) as f32);
        let scale = of_channels(&|c| factor / std[c]);
        let shift = of_channels(&|c| -mean[c] / std[c]);
        Ok(Self { size, crop, filter, scale, shift, side })
    }

    /// The encoder's input, `[3, side, side]`.
    pub fn process(&self, image: &RgbImage) -> Vec<f32> {
        let small = self.crop_resized(image);
        let mut values = Vec::with_capacity(3 * self.side * self.side);
        for channel in 0..3 {
            let (scale, shift) = (self.scale[channel], self.shift[channel]);
            let bytes = small.pixels.iter().skip(channel).step_by(3);
            values.extend(bytes.map(|&byte| f32::from(byte).mul_add(scale, shift)));
        }
        values
    }

    fn crop_resized(&self, image: &RgbImage) -> RgbImage {
        let resized = match self.size {
            Size::Exact(size) => size,
            Size::ShortestEdge(edge) => {
                let long = |long: usize, short: usize| (edge as f64 * long as f64 / short as f64) as usize;
                if image.width <= image.height {
                    [edge, long(image.height, image.width)]
                } else {
                    [long(image.width, image.height), edge]
                }
            }
        };
        let middle = |len: usize| -> Range<usize> {
            let start = (len - self.crop.unwrap_or(len)) / 2;
            start..start + self.crop.unwrap_or(len)
        };
        resize(image, resized, (middle(resized[0]), middle(resized[1])), self.filter)
    }
}

fn size(json: &JsonObject) -> Result<Size> {
    let value = json.get::<Value>("size")?.unwrap_or(Value::Null);
    let number = |key: &str| side(value.get(key));
    match (side(Some(&value)), number("shortest_edge"), number("width"), number("height")) {
        (Some(edge), ..) | (_, Some(edge), ..) => Ok(Size::ShortestEdge(edge)),
        (.., Some(width), Some(height)) => Ok(Size::Exact([width, height])),
        _ if value.is_null() => Ok(Size::ShortestEdge(224)),
        _ => Err(json.unsupported("size", &value.to_string())),
    }
}

fn crop(json: &JsonObject, default: usize) -> Result<usize> {
    let value = json.get::<Value>("crop_size")?.unwrap_or(Value::from(default));
    let square = || side(value.get("width")).filter(|&width| side(value.get("height")) == Some(width));
    side(Some(&value)).or_else(square).ok_or_else(|| json.unsupported("crop_size", &value.to_string()))
}

/// A length in pixels that an encoder could take.
fn side(value: Option<&Value>) -> Option<usize> {
    value?.as_u64().filter(|&side| (1..=4096).contains(&side)).map(|side| side as usize)
}
