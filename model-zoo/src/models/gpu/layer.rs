//! The two halves of a layer, and the products in them: one kernel each where tokens are few, norm, cuBLAS and what
//! follows where they are many.

use super::{GpuDecoder, Linear, Step};
use crate::Result;
use crate::compression::Sublayer;
use crate::kernels::cuda::device::{Output, Part};
use crate::kernels::cuda::ffn::Skips;
use crate::kernels::cuda::ops::{
    After, Matrix, Norm, Places, SKINNY_TOKENS, Tokens, activate_rows, add_rows, place_rows, product,
    rms_norm, skinny,
};
use crate::kernels::cuda::quantized::few;

impl GpuDecoder {
    /// `x += o(attention(norm(x)))`, writing K and V of the layer's tokens.
    pub(super) fn attention(&self, step: &Step, layer: usize) -> Result<()> {
        let (device, scratch, weights) = (&*self.device, &self.scratch, &self.weights.layers[layer]);
        let tokens = self.tables.selected(layer, Sublayer::Attention)?;
        if tokens.count == 0 {
            return Ok(());
        }
        let attention = self.attention_of(step, layer)?;
        let norm = self.norm(&weights.attention_norm);
        let norms = weights.qk_norm.as_ref().map(|norms| norms.each_ref().map(|norm| self.norm(norm)));
        if let Some(qkv) = self.in_levels(&weights.qkv) {
            self.place_by_levels(qkv, (tokens, norm), (norms, &attention.places))?;
        } else if let Some(qkv) = self.few_quantized(&weights.qkv, tokens) {
            self.place_quantized(&qkv, (tokens, norm), (norms, &attention.places))?;
        } else {
            let qkv = self.whole(&weights.qkv)?;
            self.place(&qkv, (tokens, norm), (norms, &attention.places))?;
        }
        self.pruned.observe(device, (attention.places.q, step.heads), (&self.tables, layer))?;
        let [single, several] = self.tables.items(layer)?;
        attention.decode(device, single, self.splits(step.heads, single.count))?;
        attention.prefill(device, several)?;
        let post = weights.post_norms.as_ref().map(|[after, _]| self.norm(after));
        self.project(&weights.o, (Part::all(&scratch.mixed), tokens), post)
    }

    /// The joint Q, K and V product of `norm(x)`, its heads normed and turned, to where it belongs.
    fn place(
        &self,
        qkv: &Matrix,
        (tokens, norm): (Tokens, Norm),
        (norms, places): (Option<[Norm; 2]>, &Places),
    ) -> Result<()> {
        let (device, x, wide) = (&*self.device, Part::all(&self.scratch.x), Part::all(&self.scratch.wide));
        let few = tokens.count <= SKINNY_TOKENS;
        if few && norms.is_none() {
            return skinny(device, qkv, (x, tokens, Some(norm)), After::Place(*places));
        }
        let bias = if few {
            skinny(device, qkv, (x, tokens, Some(norm)), After::Half(wide))?;
            Part::NONE
        } else {
            self.normed_product(qkv, (tokens, norm), (wide, Output::Half))?;
            qkv.bias
        };
        place_rows(device, (wide, bias, tokens), norms, places)
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`, but for tokens that leave it out.
    pub(super) fn ffn(&self, layer: usize) -> Result<()> {
        let (device, scratch) = (&*self.device, &self.scratch);
        let tokens = self.tables.selected(layer, Sublayer::Ffn)?;
        if tokens.count == 0 {
            return Ok(());
        }
        let (x, before) = ((Part::all(&scratch.x), self.config.hidden_size), Part::all(&scratch.before));
        let watch = self.tables.watch(layer)?;
        if let Some(watch) = &watch {
            watch.decide(device, x, before)?;
        }
        self.gated(layer, tokens)?;
        if let Some(watch) = &watch {
            watch.observe(device, x, before)?;
        }
        Ok(())
    }

    fn gated(&self, layer: usize, mut tokens: Tokens) -> Result<()> {
        let (device, scratch, weights) = (&*self.device, &self.scratch, &self.weights.layers[layer]);
        let norm = self.norm(&weights.ffn_norm);
        let (gated, activation) = (Part::all(&scratch.gated), self.config.activation);
        let post = weights.post_norms.as_ref().map(|[_, after]| self.norm(after));
        if !self.adds_at_once(post.as_ref()) {
            // What is added is read from memory, where there have to be zeros then.
            tokens.skips = tokens.skips.map(Skips::one_by_one);
        }
        if let Some(gate_up) = self.in_levels(&weights.gate_up) {
            self.gate_by_levels(gate_up, (tokens, norm), (gated, activation))?;
        } else if let Some(gate_up) = self.few_quantized(&weights.gate_up, tokens) {
            self.gate_quantized(&gate_up, (tokens, norm), (gated, activation))?;
        } else if tokens.count <= SKINNY_TOKENS {
            let (x, gate_up) = (Part::all(&scratch.x), self.whole(&weights.gate_up)?);
            skinny(device, &gate_up, (x, tokens, Some(norm)), After::Gate(gated, activation))?;
        } else {
            let gate_up = self.whole(&weights.gate_up)?;
            let wide = Part::all(&scratch.wide);
            self.normed_product(&gate_up, (tokens, norm), (wide, Output::Half))?;
            activate_rows(device, (wide, gate_up.bias), (gated, tokens, gate_up.rows / 2), activation)?;
        }
        self.project(&weights.down, (gated, tokens), post)
    }

    /// Whether what a sublayer adds goes straight to the residual stream.
    pub(super) fn adds_at_once(&self, post: Option<&Norm>) -> bool {
        post.is_none() && self.device.shard().size == 1
    }

    /// `out = matrix · norm(x)` without the bias, of many tokens.
    fn normed_product(
        &self,
        matrix: &Matrix,
        (tokens, norm): (Tokens, Norm),
        out: (Part, Output),
    ) -> Result<()> {
        let normed = Part::all(&self.scratch.normed);
        rms_norm(&*self.device, (Part::all(&self.scratch.x), tokens), norm, normed)?;
        product(&*self.device, matrix, (normed, tokens.count), out)
    }

    /// `out = matrix · norm(x)`, f32, of any number of tokens.
    pub(super) fn product_of_normed(
        &self,
        linear: &Linear,
        (tokens, norm): (Tokens, Norm),
        out: Part,
    ) -> Result<()> {
        if let Some(quantized) = linear.quantized() {
            return few(&*self.device, &quantized, (self.normed(tokens, norm)?, tokens), After::Float(out));
        }
        let matrix = &self.whole(linear)?;
        if tokens.count <= SKINNY_TOKENS {
            let x = Part::all(&self.scratch.x);
            return skinny(&*self.device, matrix, (x, tokens, Some(norm)), After::Float(out));
        }
        self.normed_product(matrix, (tokens, norm), (out, Output::Float))
    }

    /// `x += post(matrix · input)`, summed over the devices that share the model.
    fn project(&self, linear: &Linear, (input, tokens): (Part, Tokens), post: Option<Norm>) -> Result<()> {
        if let Some(linear) = self.in_levels(linear) {
            return self.project_by_levels(linear, (input, tokens), post);
        }
        if let Some(quantized) = self.few_quantized(linear, tokens) {
            return self.project_quantized(&quantized, (input, tokens), post);
        }
        let matrix = &self.whole(linear)?;
        let (device, x) = (&*self.device, Part::all(&self.scratch.x));
        let few = tokens.count <= SKINNY_TOKENS;
        let width = matrix.rows;
        if self.adds_at_once(post.as_ref()) {
            if few {
                return skinny(device, matrix, (input, tokens, None), After::Add(x));
            }
            if tokens.index.is_empty() {
                product(device, matrix, (input, tokens.count), (x, Output::Add))?;
                if !matrix.bias.is_empty() {
                    add_rows(device, (Part::NONE, matrix.bias, None), (x, tokens), width)?;
                }
                return Ok(());
            }
        }
        let sum = Part::all(&self.scratch.sum).slice(0, 4 * tokens.count * width)?;
        let plain = Matrix { bias: Part::NONE, ..*matrix };
        if few {
            skinny(device, &plain, (input, tokens, None), After::Float(sum))?;
        } else {
            product(device, &plain, (input, tokens.count), (sum, Output::Float))?;
        }
        device.all_reduce(sum)?;
        add_rows(device, (sum, matrix.bias, post), (x, tokens), width)
    }
}
