//! The two halves of a decoder layer, on a block of the residual stream.

use super::pruned::segment;
use super::visual;
use super::{CpuDecoder, Half, Layer, Scratch, Step};
use crate::compression::route::Span;
use crate::config::Activation;
use crate::kernels::cpu::attention::{AttentionShape, attention_with_lse, write_kv};
use crate::kernels::cpu::packed::Write;
use crate::kernels::cpu::rows::{for_each_row, for_each_row_pair};
use crate::kernels::cpu::vector::{add, gelu_tanh_mul, rms_norm, rms_norm_in_place, silu_mul};
use crate::kv_cache::KvCache;
use crate::layers::linear::{Activations, Cpu, Linear, forward_many};
use crate::layers::rotary::{Rotary, RotaryTable};
use crate::step::{LinearInput, StepBatch};

impl CpuDecoder {
    /// `x += o(attention(norm(x)))`, writing K and V of the block's tokens.
    pub(super) fn attention(&mut self, step: &mut Step<'_, '_>, half: Half<'_>) {
        let route = step.route;
        let spans = route.spans();
        let (config, cpu, index) = (&self.config, &self.cpu, half.layer);
        let layer = &self.weights.layers[index];
        let tokens = half.x.len() / config.hidden_size;
        let s = &mut self.scratch;
        norm_rows(cpu, half.x, (&layer.attention_norm, config.rms_norm_eps), &mut s.normed);
        show(step.batch, (index, LinearInput::Qkv), &s.normed);
        s.q.resize(tokens * layer.q.out_features(), 0.0);
        s.k.resize(tokens * layer.k.out_features(), 0.0);
        s.v.resize(tokens * layer.v.out_features(), 0.0);
        let mut normed =
            Activations::new(&s.normed, config.hidden_size, &mut s.quantized).served(&s.services);
        let store = Write::Store;
        forward_many(
            cpu,
            &mut normed,
            &mut [(&layer.q, store, &mut s.q), (&layer.k, store, &mut s.k), (&layer.v, store, &mut s.v)],
        );

        let (rotary, table) = match &self.weights.local_rotary {
            Some(local) if layer.window.is_some() => (local, &s.tables[1]),
            _ => (&self.weights.rotary, &s.tables[0]),
        };
        let place = Place { cpu, layer, rotary, table, eps: config.rms_norm_eps, index };
        place.run(step.batch, spans, (&mut s.q, &mut s.k, &s.v), step.kv);
        if let Some(probe) = &mut step.batch.probe {
            probe.attention(index, &s.q, &s.k);
        }
        let queries = std::mem::take(&mut s.q);
        self.observe_queries(step, index, &queries);
        let s = &mut self.scratch;
        s.q = queries;

        let (batch, kv) = (&*step.batch, &*step.kv);
        s.mixed.resize(s.q.len(), 0.0);
        let shape = AttentionShape {
            num_heads: config.num_heads,
            layout: kv.layout(),
            scale: config.attention_scale,
            window: layer.window,
        };
        let segments: Vec<_> =
            by_row(spans).map(|spans| segment(batch, spans, (index, kv.layout().block_size))).collect();
        let is_filtered = visual::filters(batch, spans, index);
        s.lse.resize(if is_filtered { tokens * config.num_heads } else { 0 }, 0.0);
        attention_with_lse(cpu, &shape, &segments, (&s.q, kv.pages(), &mut s.mixed, &mut s.lse));
        if is_filtered {
            s.filtered = visual::select(cpu, &shape, (step, index), (&s.q, &s.lse));
        }
        show(step.batch, (index, LinearInput::O), &s.mixed);
        let post = layer.post_norms.as_ref().map(|[after, _]| (after.as_slice(), config.rms_norm_eps));
        let Scratch { mixed, normed, quantized, services, .. } = s;
        let mut mixed = Activations::new(mixed, layer.o.in_features(), quantized).served(services);
        project(cpu, (&layer.o, &mut mixed), post, (half.x, normed));
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`
    pub(super) fn ffn(&mut self, step: &mut Step<'_, '_>, half: Half<'_>) {
        let (config, cpu) = (&self.config, &self.cpu);
        let layer = &self.weights.layers[half.layer];
        let tokens = half.x.len() / config.hidden_size;
        let Scratch { normed, quantized, services, gate, up, .. } = &mut self.scratch;
        norm_rows(cpu, half.x, (&layer.ffn_norm, config.rms_norm_eps), normed);
        show(step.batch, (half.layer, LinearInput::GateUp), normed);
        let width = layer.gate.out_features();
        gate.resize(tokens * width, 0.0);
        up.resize(tokens * width, 0.0);
        let mut input = Activations::new(normed, config.hidden_size, quantized).served(services);
        forward_many(
            cpu,
            &mut input,
            &mut [(&layer.gate, Write::Store, &mut *gate), (&layer.up, Write::Store, &mut *up)],
        );
        activate(cpu, config.activation, (gate, up), width);
        show(step.batch, (half.layer, LinearInput::Down), gate);
        let post = layer.post_norms.as_ref().map(|[_, after]| (after.as_slice(), config.rms_norm_eps));
        let mut gated = Activations::new(gate, width, quantized).served(services);
        project(cpu, (&layer.down, &mut gated), post, (half.x, normed));
    }
}

/// Shows a probe, if there is one, what linear operators are applied to.
fn show(batch: &mut StepBatch<'_>, place: (usize, LinearInput), x: &[f32]) {
    if let Some(probe) = &mut batch.probe {
        probe.linear_input(place, x);
    }
}

/// The spans of each row.
fn by_row(spans: &[Span]) -> impl Iterator<Item = &[Span]> {
    spans.chunk_by(|a, b| a.row == b.row)
}

fn norm_rows(cpu: &Cpu, x: &[f32], (weight, eps): (&[f32], f32), out: &mut Vec<f32>) {
    let (width, isa) = (weight.len(), cpu.isa);
    out.resize(x.len(), 0.0);
    for_each_row(&cpu.pool, (out, width), 1, |row, out| {
        rms_norm(isa, &x[row * width..(row + 1) * width], weight, eps, out);
    });
}

fn activate(cpu: &Cpu, activation: Activation, (gate, up): (&mut [f32], &[f32]), width: usize) {
    let isa = cpu.isa;
    for_each_row(&cpu.pool, (gate, width), 4, |row, gate| {
        let up = &up[row * width..(row + 1) * width];
        match activation {
            Activation::Silu => silu_mul(isa, gate, up),
            Activation::GeluTanh => gelu_tanh_mul(isa, gate, up),
        }
    });
}

/// `x += linear(input)`, or `x += norm(linear(input))` for sandwich norms, through `scratch`.
fn project(
    cpu: &Cpu,
    (linear, input): (&Linear, &mut Activations<'_>),
    post: Option<(&[f32], f32)>,
    (x, scratch): (&mut [f32], &mut Vec<f32>),
) {
    let Some((weight, eps)) = post else {
        return linear.forward(cpu, input, (Write::Add, x));
    };
    scratch.resize(x.len(), 0.0);
    linear.forward(cpu, input, (Write::Store, scratch));
    for (x, y) in x.chunks_exact_mut(weight.len()).zip(scratch.chunks_exact_mut(weight.len())) {
        rms_norm_in_place(cpu.isa, y, weight, eps);
        add(cpu.isa, x, y);
    }
}

/// Per-head norms, rotation, and the write of K and V into pages.
struct Place<'a> {
    cpu: &'a Cpu,
    layer: &'a Layer,
    rotary: &'a Rotary,
    table: &'a RotaryTable,
    eps: f32,
    index: usize,
}

impl Place<'_> {
    fn run(
        &self,
        batch: &StepBatch<'_>,
        spans: &[Span],
        (q, k, v): (&mut [f32], &mut [f32], &[f32]),
        kv: &mut KvCache,
    ) {
        let layout = kv.layout();
        let widths = (self.layer.q.out_features(), self.layer.k.out_features());
        // Token of the block → its span, its index in the span.
        let owners: Vec<_> = spans.iter().flat_map(|span| (0..span.len).map(move |i| (span, i))).collect();
        let (isa, norms, rotary) = (self.cpu.isa, self.layer.qk_norm.as_ref(), self.rotary);
        let (table, eps) = (self.table, self.eps);
        for_each_row_pair(&self.cpu.pool, (q, widths.0), (k, widths.1), |token, q, k| {
            let (span, i) = owners[token];
            for (heads, which) in [(q, 0), (k, 1)] {
                for head in heads.chunks_exact_mut(layout.head_dim) {
                    if let Some(norms) = norms {
                        rms_norm_in_place(isa, head, &norms[which], eps);
                    }
                    rotary.apply(table, span.step_start + i, head);
                }
            }
        });
        let mut rows = k.chunks_exact(widths.1).zip(v.chunks_exact(widths.1));
        for spans in by_row(spans) {
            let segment = segment(batch, spans, (self.index, layout.block_size));
            for (i, (k, v)) in rows.by_ref().take(segment.num_tokens).enumerate() {
                let (page, offset) = segment.place(layout, segment.kv_start + i);
                let place = (&segment.block_table[page..], offset);
                write_kv(self.cpu.isa, (layout, kv.pages_mut()), place, (k, v));
            }
        }
    }
}
