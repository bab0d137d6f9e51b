//! The points that the governor may choose between.

use model_zoo::compression::Offer;
use model_zoo::compression::registry::DENSE;
use model_zoo::models::ModelDims;

/// A plan with what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The profile's name.
    pub name: String,
    /// Perplexity over that of dense, less 1, as calibration measured it; below 0 where it was better.
    pub perplexity_increase: f64,
    /// Predicted time of a step as a share of dense: the work counters of calibration for the layers, and the
    /// output matrix, which every plan runs.
    pub work: f64,
    /// KV pages as a share of dense.
    pub kv: f64,
}

/// Points by rising loss of quality, the whole model first.
#[derive(Debug, Clone, PartialEq)]
pub struct Front(Vec<Point>);

impl Front {
    /// What `offer` has within `max_perplexity_increase`; `None` where nothing was calibrated.
    pub fn of(offer: &Offer, dims: &ModelDims, max_perplexity_increase: f64) -> Option<Self> {
        let calibrated = offer.front();
        if calibrated.is_empty() {
            return None;
        }
        let layers = (dims.num_layers * dims.sublayer_weights.iter().sum::<usize>()) as f64;
        let output = (dims.hidden_size * dims.vocab_size) as f64;
        let points = calibrated.iter().map(|point| Point {
            name: point.name.clone(),
            perplexity_increase: point.perplexity_increase,
            work: (layers * point.layer_work + output) / (layers + output),
            kv: point.kv,
        });
        Some(Self::new(points.collect(), max_perplexity_increase))
    }

    /// The whole model, and those of `points` that lose `max_perplexity_increase` at most.
    pub fn new(points: Vec<Point>, max_perplexity_increase: f64) -> Self {
        let dense = Point { name: DENSE.into(), perplexity_increase: 0.0, work: 1.0, kv: 1.0 };
        let allowed =
            |point: &Point| point.name != DENSE && point.perplexity_increase <= max_perplexity_increase;
        let mut others: Vec<_> = points.into_iter().filter(allowed).collect();
        others.sort_by(|a, b| a.perplexity_increase.total_cmp(&b.perplexity_increase));
        Self(std::iter::once(dense).chain(others).collect())
    }

    /// By rising loss of quality; never empty.
    pub fn points(&self) -> &[Point] {
        &self.0
    }
}
