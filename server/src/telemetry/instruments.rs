//! How a [`Definition`] becomes handles on the process's Prometheus registry.
//!
//! The recorder is held by value, never installed globally: several servers can live in one process.

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// One metric: its name, the name under which vLLM's dashboards know it, and what it means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Definition {
    /// Our name with the unit in it; empty when only vLLM's name exists.
    pub(super) name: &'static str,
    /// vLLM's name; empty when it has no such metric.
    pub(super) vllm: &'static str,
    /// What a sample measures.
    pub(super) unit: Unit,
    /// The help text, without the full stop that Prometheus leaves out.
    pub(super) help: &'static str,
    /// Upper bounds of our histogram's buckets; empty for counters and gauges.
    pub(super) buckets: &'static [f64],
    /// Upper bounds of vLLM's buckets.
    pub(super) vllm_buckets: &'static [f64],
}

/// A handle under our name and one under vLLM's; the latter does nothing when the names are off.
#[derive(Debug, Clone)]
pub(super) struct Paired<T> {
    ours: T,
    vllm: T,
}

impl Paired<Counter> {
    /// Adds to both counters.
    pub(super) fn add(&self, value: u64) {
        self.ours.increment(value);
        self.vllm.increment(value);
    }
}

impl Paired<Gauge> {
    /// Sets both gauges.
    pub(super) fn set(&self, value: f64) {
        self.ours.set(value);
        self.vllm.set(value);
    }
}

impl Paired<Histogram> {
    /// Records one sample in both histograms.
    pub(super) fn record(&self, value: f64) {
        self.ours.record(value);
        self.vllm.record(value);
    }
}

/// A registry that knows the buckets of every histogram and the labels that vLLM puts on every metric.
#[derive(Debug)]
pub(super) struct Instruments {
    recorder: PrometheusRecorder,
    /// Labels of every `vllm:` series, or `None` when those names are off.
    vllm_labels: Option<Vec<Label>>,
}

impl Instruments {
    /// A registry for `definitions`; `vllm_model` is the `model_name` label of the `vllm:` series.
    pub(super) fn new(definitions: &[Definition], vllm_model: Option<&str>) -> Self {
        let mut builder = PrometheusBuilder::new();
        for (name, buckets) in
            definitions.iter().flat_map(|d| [(d.name, d.buckets), (d.vllm, d.vllm_buckets)])
        {
            if !name.is_empty() && !buckets.is_empty() {
                builder = builder
                    .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                    .expect("invariant: the bucket list is not empty");
            }
        }
        let vllm_labels = vllm_model
            .map(|model| vec![Label::new("model_name", model.to_owned()), Label::new("engine", "0")]);
        Self { recorder: builder.build_recorder(), vllm_labels }
    }

    /// The recorder, to render or to register a series with labels known only later.
    pub(super) fn recorder(&self) -> &PrometheusRecorder {
        &self.recorder
    }

    /// A counter; `ours` and `vllm` are the extra labels of the two series.
    pub(super) fn counter(&self, def: &Definition, ours: Vec<Label>, vllm: Vec<Label>) -> Paired<Counter> {
        let register = |name: &'static str, labels: Vec<Label>| {
            self.recorder.describe_counter(name.into(), Some(def.unit), def.help.into());
            self.recorder.register_counter(&Key::from_parts(name, labels), &METADATA)
        };
        self.pair(def, (ours, vllm), register, Counter::noop)
    }

    /// A gauge, labelled as [`Instruments::counter`].
    pub(super) fn gauge(&self, def: &Definition, ours: Vec<Label>, vllm: Vec<Label>) -> Paired<Gauge> {
        let register = |name: &'static str, labels: Vec<Label>| {
            self.recorder.describe_gauge(name.into(), Some(def.unit), def.help.into());
            self.recorder.register_gauge(&Key::from_parts(name, labels), &METADATA)
        };
        self.pair(def, (ours, vllm), register, Gauge::noop)
    }

    /// A histogram, with `ours` as the extra labels of our series.
    pub(super) fn histogram(&self, def: &Definition, ours: Vec<Label>) -> Paired<Histogram> {
        let register = |name: &'static str, labels: Vec<Label>| {
            self.recorder.describe_histogram(name.into(), Some(def.unit), def.help.into());
            self.recorder.register_histogram(&Key::from_parts(name, labels), &METADATA)
        };
        self.pair(def, (ours, Vec::new()), register, Histogram::noop)
    }

    fn pair<T>(
        &self,
        def: &Definition,
        (ours, vllm): (Vec<Label>, Vec<Label>),
        register: impl Fn(&'static str, Vec<Label>) -> T,
        noop: fn() -> T,
    ) -> Paired<T> {
        let common = self.vllm_labels.as_ref().filter(|_| !def.vllm.is_empty());
        Paired {
            ours: if def.name.is_empty() { noop() } else { register(def.name, ours) },
            vllm: match common {
                Some(common) => register(def.vllm, common.iter().cloned().chain(vllm).collect()),
                None => noop(),
            },
        }
    }
}
