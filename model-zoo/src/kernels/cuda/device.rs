//! The device seam: memory, copies, launches, products and captured steps, whatever runs them.
//!
//! Two implementations: `driver` is an NVIDIA GPU, [`super::emulated`] runs the same kernels on the host, for
//! tests on machines without one. Work is in the order in which it is asked for; only [`Device::download`] and
//! [`Device::synchronize`] wait for it.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{Result, ZooError};

/// Memory of a device, freed when it is dropped.
pub trait Allocation: Debug + Send + Sync {
    /// Its address, as kernels see it.
    fn address(&self) -> u64;
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A shared allocation.
pub type Buffer = Arc<dyn Allocation>;

/// Memory at one address whose first bytes are there, and whose size changes without moving them.
pub trait Growable: Debug + Send {
    /// Its address, which never changes.
    fn address(&self) -> u64;
    /// Bytes that are there.
    fn len(&self) -> usize;
    /// Whether no bytes are there.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Makes the first `len` bytes be there; the others' memory is free again. What stays keeps its content.
    ///
    /// # Errors
    /// [`ZooError::Device`] when there is no room; nothing has changed then.
    fn resize(&mut self, len: usize) -> Result<()>;
}

/// Part of a device's memory, checked to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub(super) address: u64,
    pub(super) len: usize,
}

impl Part {
    /// No memory: a null pointer for kernels.
    pub const NONE: Self = Self { address: 0, len: 0 };

    /// `len` bytes of `buffer` from `offset` on.
    ///
    /// # Errors
    /// [`ZooError::Device`] when they do not lie inside it.
    pub fn of(buffer: &Buffer, offset: usize, len: usize) -> Result<Self> {
        Self { address: buffer.address(), len: buffer.len() }.slice(offset, len)
    }

    /// All of `buffer`.
    pub fn all(buffer: &Buffer) -> Self {
        Self { address: buffer.address(), len: buffer.len() }
    }

    /// All that is there now of `memory`.
    pub fn of_growable(memory: &dyn Growable) -> Self {
        Self { address: memory.address(), len: memory.len() }
    }

    /// `len` bytes of it from `offset` on.
    ///
    /// # Errors
    /// [`ZooError::Device`] when they do not lie inside it.
    pub fn slice(self, offset: usize, len: usize) -> Result<Self> {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(Self { address: self.address + offset as u64, len });
        }
        let have = self.len;
        Err(ZooError::Device(format!("{len} bytes from {offset} do not lie in a buffer of {have}")))
    }

    /// Its address, as kernels see it.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Its bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it is [`Part::NONE`] or as empty.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block: whole warps.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// The kernel's parameter, as bytes.
    pub params: &'a [u8],
    /// All blocks run at the same time, so that they may wait for each other.
    pub together: bool,
}

/// A device's description of a weight matrix of which kernels copy tiles: an opaque constant.
pub type TileMap = [u64; 16];

/// What a product writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// bf16, stored.
    Half,
    /// f32, stored.
    Float,
    /// f32, added to what is there.
    Add,
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ`, bf16 in, f32 accumulation, all dense rows.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of `x`, of `w`, and the columns that they share.
    pub size: [usize; 3],
    /// `[m, k]` bf16.
    pub x: Part,
    /// `[n, k]` bf16.
    pub w: Part,
    /// `[m, n]`.
    pub y: Part,
    /// What `y` is.
    pub output: Output,
}

/// Launches that were captured.
pub trait Graph: Debug + Send {
    /// Runs them again, after all that was asked for before.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn replay(&self) -> Result<()>;
}

/// Which of the devices that share a model this one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

impl Shard {
    /// The only device.
    pub const WHOLE: Self = Self { rank: 0, size: 1 };

    /// This one's share of `count` things.
    pub fn range(self, count: usize) -> std::ops::Range<usize> {
        self.rank * count / self.size..(self.rank + 1) * count / self.size
    }
}

/// A device that kernels run on.
pub trait Device: Debug + Send + Sync {
    /// What it is, for people.
    fn name(&self) -> String;

    /// Multiprocessors: how many blocks it takes to fill it.
    fn multiprocessors(&self) -> u32;

    /// Bytes of shared memory that a block may have.
    fn block_memory(&self) -> usize;

    /// Whether it can run blocks of a launch at the same time (see [`Launch::together`]).
    fn runs_together(&self) -> bool;

    /// Whether it has the copy engine and the barriers that [`super::fused`] takes: Hopper's and later ones'.
    fn copies_tiles(&self) -> bool;

    /// Describes the bf16 matrix `[rows, cols]`, `cols` a multiple of 64, for copies of 16 rows and 8 times 64 columns.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn tile_map(&self, matrix: Part, rows: usize, cols: usize) -> Result<TileMap>;

    /// Bytes of memory that are free, and all of them.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn memory(&self) -> Result<(u64, u64)>;

    /// `len` bytes whose content is not defined.
    ///
    /// # Errors
    /// [`ZooError::Device`] when there is no room.
    fn alloc(&self, len: usize) -> Result<Buffer>;

    /// An address with room for `most` bytes, none of which is there yet.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn reserve(&self, most: usize) -> Result<Box<dyn Growable>>;

    /// Copies `bytes` to the beginning of `to`. `bytes` may be changed when this returns.
    ///
    /// # Errors
    /// [`ZooError::Device`] when they do not fit.
    fn upload(&self, to: Part, bytes: &[u8]) -> Result<()>;

    /// Waits for all work, and copies the beginning of `from` to `bytes`.
    ///
    /// # Errors
    /// [`ZooError::Device`]; of failed kernels, too.
    fn download(&self, from: Part, bytes: &mut [u8]) -> Result<()>;

    /// Copies one part to another of the same length.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn copy(&self, from: Part, to: Part) -> Result<()>;

    /// Sets every byte of `part`.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn fill(&self, part: Part, byte: u8) -> Result<()>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`ZooError::Device`] when there is no such kernel or it cannot be launched.
    ///
    /// # Safety
    /// `params` is of the kernel's type, and every access that the kernel makes by it lies in live memory.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Multiplies.
    ///
    /// # Errors
    /// [`ZooError::Device`] when a part is too short.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// From here on launches, products, copies and fills are recorded and not run. Nothing else may be asked for
    /// until [`Device::end_capture`].
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn begin_capture(&self) -> Result<()>;

    /// What was recorded. Its memory must live as long as it does: the caller keeps the buffers.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn end_capture(&self) -> Result<Box<dyn Graph>>;

    /// Which of the devices that share a model it is.
    fn shard(&self) -> Shard {
        Shard::WHOLE
    }

    /// Sums the f32 values of `part` over all devices that share the model, on each of them. One device has
    /// nothing to do.
    ///
    /// # Errors
    /// [`ZooError::Device`].
    fn all_reduce(&self, _part: Part) -> Result<()> {
        Ok(())
    }

    /// Joules that it has used since its driver was loaded, where it has a meter.
    fn joules(&self) -> Option<f64> {
        None
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// [`ZooError::Device`]; of failed kernels, too.
    fn synchronize(&self) -> Result<()>;
}

impl Gemm {
    /// Fails where a part is too short.
    pub(super) fn check(&self) -> Result<()> {
        let [m, n, k] = self.size;
        let out = m * n * if self.output == Output::Half { 2 } else { 4 };
        if self.x.len() < 2 * m * k || self.w.len() < 2 * n * k || self.y.len() < out {
            return Err(ZooError::Device(format!("a product of size {m}×{n}×{k} with parts too short")));
        }
        Ok(())
    }
}
