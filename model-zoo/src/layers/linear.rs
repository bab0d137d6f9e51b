//! Linear operators: a weight matrix in whatever form it is held, that knows its bytes.

use candle_core::quantized::GgmlDType;

use crate::kernels::cpu::bitstack::{self, Columns, Rows, StackProduct};
use crate::kernels::cpu::dense::{DenseMatrix, Values};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::packed::{PackedMatrix, Product, Write, matmul_many};
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::quantize::QuantizedRows;
use crate::kernels::cpu::vector::add_bias;
use crate::layers::stack::{Service, StackMatrix};
use crate::weights::RawTensor;
use crate::weights::blocks::BlockFormat;
use crate::{Result, ZooError};

/// What kernels run on.
#[derive(Debug)]
pub struct Cpu {
    /// Threads.
    pub pool: Pool,
    /// Vector instructions.
    pub isa: Isa,
}

/// Memory of quantized activations that is kept from call to call.
#[derive(Debug, Default)]
pub struct ActivationScratch {
    quantized: QuantizedRows,
    columns: Columns,
}

/// Rows of activations on their way into linear operators: quantized once, on first need.
#[derive(Debug)]
pub struct Activations<'a> {
    x: &'a [f32],
    channels: usize,
    scratch: &'a mut ActivationScratch,
    ready: bool,
    services: &'a [Service],
}

impl<'a> Activations<'a> {
    /// `x` is `[n, channels]`; `scratch` keeps memory between calls.
    pub fn new(x: &'a [f32], channels: usize, scratch: &'a mut ActivationScratch) -> Self {
        Self { x, channels, scratch, ready: false, services: &[] }
    }

    /// The same rows, of which weights in levels serve each as its entry of `services` says. Without, every row is
    /// served with all levels held, as one of many.
    #[must_use]
    pub fn served(self, services: &'a [Service]) -> Self {
        Self { services, ..self }
    }

    fn quantize(&mut self, cpu: &Cpu) {
        if !self.ready {
            self.scratch.quantized.quantize(&cpu.pool, self.x, self.channels);
            self.ready = true;
        }
    }

    /// How each row is served.
    fn services(&self) -> Vec<Service> {
        if self.services.is_empty() {
            return vec![Service { blocks: usize::MAX, many: true }; self.x.len() / self.channels];
        }
        self.services.to_vec()
    }
}

/// `y = x·Wᵀ + b` with `W` `[out_features, in_features]`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Weight {
    Packed(PackedMatrix),
    Dense(DenseMatrix),
    Stack(StackMatrix),
}

impl Linear {
    /// Takes a tensor as stored and holds it in the form that its kernel wants.
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] when the type is not served or the width does not fit its blocks.
    pub fn new(cpu: &Cpu, weight: &RawTensor<'_>, bias: Option<&RawTensor<'_>>) -> Result<Self> {
        let &[rows, cols] = weight.shape.as_slice() else {
            return Err(ZooError::Unsupported(format!(
                "a linear weight has two dimensions, not {:?}",
                weight.shape
            )));
        };
        let bias = bias_of(rows, bias)?;
        let weight = match BlockFormat::of(weight.dtype) {
            Some(format) => Weight::Packed(pack(cpu, weight, format)?),
            None => Weight::Dense(DenseMatrix::new([rows, cols], dense(weight)?)),
        };
        Ok(Self { weight, bias })
    }

    /// An operator in levels that holds none yet; see [`Linear::stack_mut`].
    ///
    /// # Errors
    /// [`ZooError::Unsupported`] when the sizes or the bias are not served.
    pub fn in_levels(matrix: StackMatrix, bias: Option<&RawTensor<'_>>) -> Result<Self> {
        matrix.shape().check()?;
        let rows = matrix.shape().rows;
        Ok(Self { weight: Weight::Stack(matrix), bias: bias_of(rows, bias)? })
    }

    /// The matrix, where it comes in levels.
    pub fn stack_mut(&mut self) -> Option<&mut StackMatrix> {
        match &mut self.weight {
            Weight::Stack(matrix) => Some(matrix),
            Weight::Packed(_) | Weight::Dense(_) => None,
        }
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        match &self.weight {
            Weight::Packed(m) => m.rows(),
            Weight::Dense(m) => m.rows(),
            Weight::Stack(m) => m.shape().rows,
        }
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        match &self.weight {
            Weight::Packed(m) => m.cols(),
            Weight::Dense(m) => m.cols(),
            Weight::Stack(m) => m.shape().cols,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * self.bias.as_ref().map_or(0, Vec::len)
            + match &self.weight {
                Weight::Packed(m) => m.bytes(),
                Weight::Dense(m) => m.bytes(),
                Weight::Stack(m) => m.bytes(),
            }
    }

    /// Writes weight row `row` as f32 to `out`, `[in_features]`: the embedding of a token.
    pub fn row(&self, cpu: &Cpu, row: usize, out: &mut [f32]) {
        match &self.weight {
            Weight::Packed(m) => m.dequantize_row(row, out),
            Weight::Dense(m) => m.dequantize_row(cpu.isa, row, out),
            Weight::Stack(m) => m.row(row, out),
        }
    }

    /// Applies the operator to `x`, storing into or adding to `out`, `[n, out_features]`.
    pub fn forward(&self, cpu: &Cpu, x: &mut Activations<'_>, (write, out): (Write, &mut [f32])) {
        forward_many(cpu, x, &mut [(self, write, out)]);
    }
}

/// Applies several operators to the same rows, those of one kind in one parallel region.
pub fn forward_many(cpu: &Cpu, x: &mut Activations<'_>, parts: &mut [(&Linear, Write, &mut [f32])]) {
    let mut packed = Vec::with_capacity(parts.len());
    let mut stacks = Vec::new();
    for (linear, write, out) in parts.iter_mut() {
        match &linear.weight {
            Weight::Packed(matrix) => packed.push(Product { matrix, write: *write, out }),
            Weight::Dense(matrix) => matrix.matmul(&cpu.pool, cpu.isa, x.x, (*write, out)),
            Weight::Stack(matrix) => stacks.push((matrix, *write, &mut **out)),
        }
    }
    if !packed.is_empty() {
        x.quantize(cpu);
        matmul_many(&cpu.pool, cpu.isa, &x.scratch.quantized, &mut packed);
    }
    if !stacks.is_empty() {
        forward_stacks(cpu, x, &mut stacks);
    }
    for (linear, _, out) in parts {
        if let Some(bias) = &linear.bias {
            add_bias(cpu.isa, out, bias);
        }
    }
}

/// Applies operators in levels: each row with the levels that it is served with.
fn forward_stacks(cpu: &Cpu, x: &mut Activations<'_>, stacks: &mut [(&StackMatrix, Write, &mut [f32])]) {
    let services = x.services();
    let (many, mut few): (Vec<_>, Vec<_>) = (0..services.len()).partition(|&row| services[row].many);
    // More blocks are never fewer levels of any matrix.
    few.sort_by_key(|&row| std::cmp::Reverse(services[row].blocks));
    if !many.is_empty() {
        x.quantize(cpu);
    }
    let used: Vec<Vec<usize>> = stacks
        .iter()
        .map(|(matrix, ..)| {
            let held = matrix.levels().len();
            services.iter().map(|service| matrix.used(service.blocks).min(held)).collect()
        })
        .collect();
    let products = stacks.iter_mut().zip(&used);
    let mut products: Vec<_> = products
        .map(|((matrix, write, out), used)| StackProduct {
            levels: matrix.levels(),
            used,
            write: *write,
            out,
        })
        .collect();
    let rows = Rows { x: x.x, channels: x.channels, few: &few, many: &many };
    let ActivationScratch { quantized, columns } = &mut *x.scratch;
    bitstack::matmul_many((&cpu.pool, cpu.isa), rows, (quantized, columns), &mut products);
}

fn bias_of(rows: usize, bias: Option<&RawTensor<'_>>) -> Result<Option<Vec<f32>>> {
    let bias = bias.map(to_f32).transpose()?;
    if bias.as_ref().is_some_and(|b| b.len() != rows) {
        return Err(ZooError::Unsupported(format!("a bias of a {rows}-row weight has another length")));
    }
    Ok(bias)
}

fn pack(cpu: &Cpu, weight: &RawTensor<'_>, format: BlockFormat) -> Result<PackedMatrix> {
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    if !cols.is_multiple_of(format.stored_columns()) {
        let (dtype, n) = (weight.dtype, format.stored_columns());
        return Err(ZooError::Unsupported(format!(
            "{dtype:?} weights of width {cols}: not a multiple of {n}"
        )));
    }
    let row_len = format.stored_len(cols);
    check_len(weight, rows * row_len)?;
    let block = |row: usize, index: usize| format.block(&weight.data[row * row_len..][..row_len], index);
    Ok(PackedMatrix::pack(&cpu.pool, [rows, cols], format.packing, block))
}

fn check_len(tensor: &RawTensor<'_>, expected: usize) -> Result<()> {
    if tensor.data.len() == expected {
        return Ok(());
    }
    let (shape, len) = (&tensor.shape, tensor.data.len());
    Err(ZooError::Unsupported(format!("a tensor of shape {shape:?} has {len} bytes, not {expected}")))
}

/// A tensor's values in the precision of its file.
///
/// # Errors
/// [`ZooError::Unsupported`] when it is quantized or its length is wrong.
pub(crate) fn dense(tensor: &RawTensor<'_>) -> Result<Values> {
    let count: usize = tensor.shape.iter().product();
    let halves = || tensor.data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    match tensor.dtype {
        GgmlDType::F32 => {
            check_len(tensor, 4 * count)?;
            let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(Values::F32(tensor.data.chunks_exact(4).map(value).collect()))
        }
        GgmlDType::F16 => check_len(tensor, 2 * count).map(|()| Values::F16(halves())),
        GgmlDType::BF16 => check_len(tensor, 2 * count).map(|()| Values::Bf16(halves())),
        other => Err(ZooError::Unsupported(format!("tensors of type {other:?}"))),
    }
}

/// A small tensor (a norm's weight, a bias) as f32.
///
/// # Errors
/// [`ZooError::Unsupported`] when it is quantized or its length is wrong.
pub fn to_f32(tensor: &RawTensor<'_>) -> Result<Vec<f32>> {
    let count = tensor.shape.iter().product();
    let matrix = DenseMatrix::new([1, count], dense(tensor)?);
    let mut out = vec![0f32; count];
    matrix.dequantize_row(Isa::Portable, 0, &mut out);
    Ok(out)
}
