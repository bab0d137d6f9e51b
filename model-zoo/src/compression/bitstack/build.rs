//! Making a stack: measure the inputs, decompose every matrix, sort the blocks, write the artefact.
//!
//! What is done is kept in a journal beside the artefact, so that a build that was interrupted goes on where it was,
//! and ends with the same file, byte for byte. Nothing depends on the number of threads.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use super::artefact::{Contents, Provenance, write};
use super::avd::take_level;
use super::dense::sum_of;
use super::fit::Residual;
use super::inputs::Inputs;
use super::journal::Journal;
use super::order::{self, Judge, Order};
use super::published::Scaling;
use super::scale::{Measured, Moments};
use super::source::Source;
use super::{Block, LinearId, Shape};
use crate::calibrate::Progress;
use crate::compression::Plan;
use crate::eval::Runner;
use crate::models::decoder::CpuDecoder;
use crate::step::LinearInput;
use crate::{Result, ZooError};

/// Bytes of second moments that are held at once: more layers are measured in several passes over the text.
const MOMENT_BYTES: usize = 1 << 30;

/// How matrices are decomposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// As the paper does it: scaled columns, one greedy step a level, factors from singular vectors.
    Published,
    /// Signs and factors fitted to the matrix's inputs, see [`super::fit`].
    Fitted,
}

/// What a build is to make.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Levels of every matrix.
    pub levels: usize,
    /// Rank of a level's magnitudes.
    pub rank: usize,
    /// How matrices are decomposed.
    pub method: Method,
    /// Levels that are chosen together, from the first on; those after them are chosen one by one.
    pub group: usize,
    /// How the blocks are sorted.
    pub order: Order,
    /// Hold an unquantized embedding or output matrix in Q8_0.
    pub eight_bit: bool,
    /// Compute threads.
    pub threads: usize,
}

/// The text that inputs are measured on, in windows of equal length.
#[derive(Debug, Clone, Copy)]
pub struct Windows<'a> {
    /// For the inputs of the matrices.
    pub inputs: &'a [Vec<u32>],
    /// For the order of the blocks.
    pub order: &'a [Vec<u32>],
}

/// The journal of an artefact that is being built at `out`.
pub fn journal_path(out: &Path) -> PathBuf {
    PathBuf::from(format!("{}.journal", out.display()))
}

/// Builds the artefact `out` of `source`.
///
/// # Errors
/// [`ZooError::Compression`] when the settings do not fit the model, [`ZooError::Io`] and [`ZooError::Format`] about
/// the files, [`ZooError::Step`] when the model cannot read the text.
pub fn build(
    source: &Source,
    (settings, provenance): (&Settings, Provenance),
    windows: Windows<'_>,
    (out, progress): (&Path, &mut dyn FnMut(Progress)),
) -> Result<()> {
    check(source, settings)?;
    let Provenance { weights_sha256, text_sha256, tokens, .. } = &provenance;
    let name = format!("{} of {weights_sha256} on {tokens} tokens of {text_sha256}", settings.words());
    let mut work = Work {
        source,
        settings,
        windows,
        decoder: source.decoder(settings.threads)?,
        journal: Journal::open(&journal_path(out), &name)?,
        progress,
    };
    let scaling = work.decompose()?;
    let stack = work.order()?;
    let mut tensors = source.other_tensors(settings.eight_bit)?;
    if let Some(scaling) = scaling {
        scaling.apply_to_tensors(source, &mut tensors);
    }
    let settings_words = format!("{}, order by {}", settings.words(), settings.order.name());
    let contents = Contents {
        config: &source.config,
        provenance: Provenance { settings: settings_words, ..provenance },
        ranks: vec![settings.rank; 7 * source.config.num_layers],
        tokenizer: &source.tokenizer,
        tensors,
        stack,
    };
    let journal = work.journal;
    write(out, &contents, &mut |linear, level| journal.block(linear, level))?;
    journal.remove()
}

impl Settings {
    /// What the blocks depend on.
    fn words(&self) -> String {
        let Self { levels, rank, method, group, .. } = self;
        let eight_bit = if self.eight_bit { ", 8-bit embedding" } else { "" };
        match method {
            Method::Published => format!("published, {levels} levels of rank {rank}{eight_bit}"),
            Method::Fitted => format!("fitted, {levels} levels of rank {rank}, {group} together{eight_bit}"),
        }
    }
}

fn check(source: &Source, settings: &Settings) -> Result<()> {
    let refuse = |reason: String| Err(ZooError::Compression(reason));
    if settings.levels < 1 || settings.levels > 64 {
        return refuse(format!("{} levels; 1 to 64 are possible", settings.levels));
    }
    if settings.group < 1 || settings.group > settings.levels.min(4) {
        let most = settings.levels.min(4);
        return refuse(format!("{} levels chosen together; 1 to {most} are possible", settings.group));
    }
    for linear in LinearId::all(source.config.num_layers).take(7) {
        let [rows, cols] = linear.projection.size(&source.config);
        if !(rows * cols).is_multiple_of(8) {
            return refuse(format!("{linear} of {rows} by {cols}: its signs do not fill bytes"));
        }
        if settings.rank < 1 || settings.rank > rows.min(cols) {
            let most = rows.min(cols);
            return refuse(format!("rank {}; {linear} can have 1 to {most}", settings.rank));
        }
    }
    Ok(())
}

/// A build on its way.
struct Work<'a> {
    source: &'a Source,
    settings: &'a Settings,
    windows: Windows<'a>,
    decoder: CpuDecoder,
    journal: Journal,
    progress: &'a mut dyn FnMut(Progress),
}

/// A matrix decomposed.
struct Decomposed {
    linear: LinearId,
    shape: Shape,
    errors: Vec<f64>,
    blocks: Vec<Block>,
}

impl Work<'_> {
    /// Decomposes every matrix that is not in the journal. Returns the published scaling, where it is used.
    fn decompose(&mut self) -> Result<Option<Scaling>> {
        let config = &self.source.config;
        let at_once = (MOMENT_BYTES / Moments::bytes_of_layer(config)).max(1);
        let published = self.settings.method == Method::Published;
        let mut scaling = Scaling::default();
        for first in (0..config.num_layers).step_by(at_once) {
            let layers = first..(first + at_once).min(config.num_layers);
            let missing = |&(layer, input): &(usize, LinearInput)| {
                let linears = input.projections().iter().map(|&projection| LinearId { layer, projection });
                linears.into_iter().any(|linear| self.journal.levels(linear).is_none())
            };
            let tasks = layers.clone().flat_map(|layer| LinearInput::ALL.map(|input| (layer, input)));
            let tasks: Vec<_> = tasks.filter(missing).collect();
            if tasks.is_empty() && !published {
                continue;
            }
            let measured = self.measure(layers.clone())?;
            if published {
                layers.into_iter().try_for_each(|_| scaling.add_layer(config, &measured))?;
            }
            self.run(&tasks, &measured, published.then_some(&scaling))?;
        }
        Ok(published.then_some(scaling))
    }

    /// Shows the text to the model and sums up what it applies the matrices of `layers` to.
    fn measure(&mut self, layers: Range<usize>) -> Result<Measured> {
        let mut moments = Moments::new(&self.source.config, layers, self.settings.threads);
        let plan = Plan::dense(self.source.config.num_layers);
        let windows = self.windows.inputs;
        let mut runner = Runner::new(&mut self.decoder, 1, windows.first().map_or(1, Vec::len))?;
        for (index, window) in windows.iter().enumerate() {
            runner.teach(&plan, window, Some(&mut moments))?;
            (self.progress)(Progress { stage: "inputs", done: index + 1, total: windows.len() });
        }
        Ok(moments.into_measured())
    }

    /// Decomposes the matrices of `tasks` on all threads, and puts them into the journal in order.
    fn run(
        &mut self,
        tasks: &[(usize, LinearInput)],
        measured: &Measured,
        scaling: Option<&Scaling>,
    ) -> Result<()> {
        let (source, settings) = (self.source, self.settings);
        let next = AtomicUsize::new(0);
        let (sender, receiver) = sync_channel(2 * settings.threads);
        let all = LinearId::all(source.config.num_layers).count();
        std::thread::scope(|scope| {
            for _ in 0..settings.threads {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(&task) = tasks.get(index) else { break };
                        let done = decompose(source, settings, (task, measured, scaling));
                        if sender.send((index, done)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let (mut early, mut expected) = (BTreeMap::new(), 0);
            for (index, done) in receiver {
                early.insert(index, done);
                while let Some(done) = early.remove(&expected) {
                    for Decomposed { linear, shape, errors, blocks } in done? {
                        self.journal.add_levels((linear, shape), &errors, &blocks)?;
                        let done = LinearId::all(source.config.num_layers);
                        let done = done.filter(|&linear| self.journal.levels(linear).is_some()).count();
                        (self.progress)(Progress { stage: "decomposition", done, total: all });
                    }
                    expected += 1;
                }
            }
            Ok(())
        })
    }

    /// The blocks above the base, sorted.
    fn order(&mut self) -> Result<Vec<(LinearId, usize)>> {
        let linears: Vec<_> = LinearId::all(self.source.config.num_layers).collect();
        let judge = Judge::new(&mut self.decoder, self.windows.order, self.source)?;
        order::stack(
            self.settings.order,
            (&linears, self.settings.levels),
            judge,
            (&mut self.journal, self.progress),
        )
    }
}

/// Decomposes the matrices that share an input.
fn decompose(
    source: &Source,
    settings: &Settings,
    ((layer, input), measured, scaling): ((usize, LinearInput), &Measured, Option<&Scaling>),
) -> Result<Vec<Decomposed>> {
    let sums = measured.of(layer, input);
    let inputs = Inputs::measured(&sums.moments(), sums.width);
    let linears = input.projections().iter().map(|&projection| LinearId { layer, projection });
    linears
        .map(|linear| {
            let weight = source.matrix(linear)?;
            let [rows, cols] = linear.projection.size(&source.config);
            let shape = Shape { rows, cols, rank: settings.rank };
            let (blocks, errors) = match scaling {
                Some(scaling) => published(weight, (linear, shape), settings.levels, (&inputs, scaling)),
                None => fitted(&weight, (linear, shape), settings, &inputs),
            };
            let bad = |half: &u16| half & 0x7c00 == 0x7c00;
            if blocks.iter().any(|block| block.u.iter().chain(&block.vt).any(bad)) {
                let reason = format!("{linear}: its factors are beyond the range of f16");
                return Err(ZooError::Compression(reason));
            }
            Ok(Decomposed { linear, shape, errors, blocks })
        })
        .collect()
}

fn published(
    mut weight: Vec<f32>,
    (linear, shape): (LinearId, Shape),
    levels: usize,
    (inputs, scaling): (&Inputs, &Scaling),
) -> (Vec<Block>, Vec<f64>) {
    let mut errors = vec![inputs.error(&inputs.columns_of(&weight))];
    scaling.apply(linear, &mut weight, false);
    let blocks = (0..levels).map(|level| {
        let block = take_level(&mut weight, shape, (linear, level));
        let mut residual = weight.clone();
        scaling.apply(linear, &mut residual, true);
        errors.push(inputs.error(&inputs.columns_of(&residual)));
        block
    });
    (blocks.collect(), errors)
}

fn fitted(
    weight: &[f32],
    (linear, shape): (LinearId, Shape),
    settings: &Settings,
    inputs: &Inputs,
) -> (Vec<Block>, Vec<f64>) {
    let mut residual = Residual::new(weight, shape, inputs);
    let mut errors = vec![inputs.error(residual.columns())];
    let mut blocks: Vec<Block> = Vec::new();
    while blocks.len() < settings.levels {
        let count = if blocks.is_empty() { settings.group } else { 1 };
        let group = residual.take_group(inputs, linear, (blocks.len(), count));
        for held in 1..=count {
            // Inside a group its later levels are missing.
            let missing = inputs.columns_of(&sum_of(&group[held..], shape));
            let left: Vec<f32> = residual.columns().iter().zip(&missing).map(|(left, m)| left + m).collect();
            errors.push(inputs.error(&left));
        }
        blocks.extend(group);
    }
    (blocks, errors)
}
