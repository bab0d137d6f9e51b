//! PNG, JPEG and WebP to RGB, within bounds that are checked before memory is taken.

use std::io::Cursor;

use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits};

use crate::{Result, ZooError};

/// An image of bytes, `[height, width, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Red, green, blue, row by row from the top.
    pub pixels: Vec<u8>,
}

/// Longest side of an image, in pixels: what is resized holds a line of every row.
const MAX_SIDE: u32 = 16_384;

/// Decodes the file `bytes` and turns it upright as its EXIF orientation says. Transparency is left out, as
/// Pillow's `convert("RGB")` leaves it out; of deeper channels the high bytes count.
///
/// # Errors
/// [`ZooError::Image`] when it is no PNG, JPEG or WebP, is damaged, or has more than `max_pixels` pixels. No
/// image takes more than four bytes a pixel of that limit.
pub fn decode(bytes: &[u8], max_pixels: u64) -> Result<RgbImage> {
    let format = image::guess_format(bytes).ok();
    let input = Cursor::new(bytes);
    match format {
        Some(ImageFormat::Png) => {
            let limits = limits(max_pixels);
            PngDecoder::with_limits(input, limits).map_err(|e| damaged(&e)).and_then(|d| read(d, max_pixels))
        }
        Some(ImageFormat::Jpeg) => {
            JpegDecoder::new(input).map_err(|e| damaged(&e)).and_then(|d| read(d, max_pixels))
        }
        Some(ImageFormat::WebP) => {
            WebPDecoder::new(input).map_err(|e| damaged(&e)).and_then(|d| read(d, max_pixels))
        }
        _ => Err(ZooError::Image("it is not a PNG, JPEG or WebP file".into())),
    }
}

fn read(mut decoder: impl ImageDecoder, max_pixels: u64) -> Result<RgbImage> {
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > max_pixels || width.max(height) > MAX_SIDE {
        return Err(ZooError::Image(format!(
            "it has {width} × {height} pixels; images of up to {max_pixels} pixels are taken, {MAX_SIDE} along a side"
        )));
    }
    if decoder.total_bytes() > 4 * max_pixels {
        return Err(ZooError::Image(format!(
            "decoded it has {} bytes; images of up to {} bytes are taken",
            decoder.total_bytes(),
            4 * max_pixels
        )));
    }
    decoder.set_limits(limits(max_pixels)).map_err(|e| damaged(&e))?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(|e| damaged(&e))?;
    decoded.apply_orientation(orientation);
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    Ok(RgbImage { width, height, pixels: to_rgb(decoded) })
}

fn limits(max_pixels: u64) -> Limits {
    let mut limits = Limits::default();
    // The decoded image, and what a decoder needs besides.
    limits.max_alloc = Some(8 * max_pixels + (1 << 20));
    limits
}

fn damaged(error: &ImageError) -> ZooError {
    ZooError::Image(match error {
        ImageError::Limits(_) => "it needs more memory than images may take".into(),
        other => format!("it is damaged: {other}"),
    })
}

fn to_rgb(image: DynamicImage) -> Vec<u8> {
    let grey = |value: u8| [value; 3];
    let high = |value: u16| (value >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(rgb) => rgb.into_raw(),
        DynamicImage::ImageRgba8(rgba) => {
            rgba.as_raw().chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect()
        }
        DynamicImage::ImageLuma8(luma) => luma.as_raw().iter().flat_map(|&v| grey(v)).collect(),
        DynamicImage::ImageLumaA8(luma) => luma.as_raw().chunks_exact(2).flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageLuma16(luma) => luma.as_raw().iter().flat_map(|&v| grey(high(v))).collect(),
        DynamicImage::ImageLumaA16(luma) => {
            luma.as_raw().chunks_exact(2).flat_map(|p| grey(high(p[0]))).collect()
        }
        DynamicImage::ImageRgb16(rgb) => rgb.as_raw().iter().map(|&v| high(v)).collect(),
        DynamicImage::ImageRgba16(rgba) => {
            rgba.as_raw().chunks_exact(4).flat_map(|p| [high(p[0]), high(p[1]), high(p[2])]).collect()
        }
        other => other.into_rgb8().into_raw(),
    }
}
