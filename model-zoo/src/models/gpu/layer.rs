//! The two halves of a layer, and the products in them: one kernel each where tokens are few, norm, cuBLAS and what
//! follows where they are many.

use super::{GpuDecoder, Linear, Step};
use crate::Result;
use crate::compression::Sublayer;
use crate::kernels::cuda::device::{Output, Part};
use crate::kernels::cuda::ffn::Skips;
use crate::kernels::cuda::ops::{
    After, Matrix, Norm, Places, Tokens, activate_rows, add_rows, place_rows, product,
};

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
        } else {
            self.place(&weights.qkv, (tokens, norm), (norms, &attention.places))?;
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
        qkv: &Linear,
        (tokens, norm): (Tokens, Norm),
        (norms, places): (Option<[Norm; 2]>, &Places),
    ) -> Result<()> {
        let (x, wide) = (Part::all(&self.scratch.x), Part::all(&self.scratch.wide));
        let input = (x, tokens, Some(norm));
        let few = qkv.are_few(tokens);
        if few && norms.is_none() {
            return self.few(&qkv.operand()?, input, After::Place(*places));
        }
        let bias = if few {
            self.few(&qkv.operand()?, input, After::Half(wide))?;
            Part::NONE
        } else {
            let qkv = self.whole(qkv)?;
            self.normed_product(&qkv, (tokens, norm), (wide, Output::Half))?;
            qkv.bias
        };
        place_rows(&*self.device, (wide, bias, tokens), norms, places)
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
        } else if weights.gate_up.are_few(tokens) {
            let (x, gate_up) = (Part::all(&scratch.x), weights.gate_up.operand()?);
            self.few(&gate_up, (x, tokens, Some(norm)), After::Gate(gated, activation))?;
        } else {
            let gate_up = self.whole(&weights.gate_up)?;
            let wide = Part::all(&scratch.wide);
            self.normed_product(&gate_up, (tokens, norm), (wide, Output::Half))?;
            activate_rows(device, (wide, gate_up.bias), (gated, tokens, gate_up.rows / 2), activation)?;
        }
        self.project(&weights.down, (gated, tokens), post)
    }

    /// Whether what a sublayer adds goes straight to the residual stream.
    fn adds_at_once(&self, post: Option<&Norm>) -> bool {
        post.is_none() && self.device.shard().size == 1
    }

    /// `out = matrix · norm(x)` without the bias, of many tokens.
    fn normed_product(
        &self,
        matrix: &Matrix,
        (tokens, norm): (Tokens, Norm),
        out: (Part, Output),
    ) -> Result<()> {
        let normed = self.normed(tokens, norm)?;
        product(&*self.device, matrix, (normed, tokens.count), out)
    }

    /// `out = matrix · norm(x)`, f32, of any number of tokens; of codes there is no room to make the head whole.
    pub(super) fn product_of_normed(
        &self,
        linear: &Linear,
        (tokens, norm): (Tokens, Norm),
        out: Part,
    ) -> Result<()> {
        if linear.is_quantized() || linear.are_few(tokens) {
            let x = Part::all(&self.scratch.x);
            return self.few(&linear.operand()?, (x, tokens, Some(norm)), After::Float(out));
        }
        self.normed_product(&self.whole(linear)?, (tokens, norm), (out, Output::Float))
    }

    /// `x += post(matrix · input)`, summed over the devices that share the model.
    fn project(&self, linear: &Linear, (input, tokens): (Part, Tokens), post: Option<Norm>) -> Result<()> {
        if let Some(linear) = self.in_levels(linear) {
            return self.project_by_levels(linear, (input, tokens), post);
        }
        let (device, x) = (&*self.device, Part::all(&self.scratch.x));
        let (width, bias) = (linear.rows, linear.bias());
        let few = linear.are_few(tokens);
        if self.adds_at_once(post.as_ref()) {
            if few {
                return self.few(&linear.operand()?, (input, tokens, None), After::Add(x));
            }
            if tokens.index.is_empty() {
                product(device, &self.whole(linear)?, (input, tokens.count), (x, Output::Add))?;
                if !bias.is_empty() {
                    add_rows(device, (Part::NONE, bias, None), (x, tokens), width)?;
                }
                return Ok(());
            }
        }
        let sum = Part::all(&self.scratch.sum).slice(0, 4 * tokens.count * width)?;
        if few {
            self.few(&linear.operand()?.without_bias(), (input, tokens, None), After::Float(sum))?;
        } else {
            product(device, &self.whole(linear)?, (input, tokens.count), (sum, Output::Float))?;
        }
        device.all_reduce(sum)?;
        add_rows(device, (sum, bias, post), (x, tokens), width)
    }
}
