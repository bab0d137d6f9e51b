//! The emulated device: the kernels as the host's compiler made them (`emulate/`), memory that is full of NaN until it
//! is written, and guards around every allocation. For tests.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use half::bf16;

use super::device::{
    Allocation, Buffer, Device, Gemm, Graph, Growable, Launch, Output, Part, Shard, TileMap,
};
use super::ops::need;
use crate::{Result, ZooError};

unsafe extern "C" {
    fn rheostat_emulate_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared: u32,
        params: *const c_void,
        params_len: u32,
        downwards: c_int,
    ) -> *const c_char;
}

/// In which order blocks, and threads between barriers, run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Upwards,
    /// From the last to the first.
    Downwards,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Emulated {
    order: Order,
    /// What is recorded while a capture is under way.
    recording: Arc<Mutex<Option<Vec<Work>>>>,
    /// Multiprocessors that it says it has.
    multiprocessors: u32,
    group: Option<(Shard, Arc<Group>)>,
}

/// Emulated devices that share a model.
#[derive(Debug)]
pub struct Group {
    barrier: Barrier,
    sum: Mutex<Vec<f32>>,
}

#[derive(Debug, Clone)]
enum Work {
    Launch { kernel: &'static str, grid: [u32; 3], threads: u32, shared: u32, params: Vec<u8> },
    Gemm(Gemm),
    Copy(Part, Part),
    Fill(Part, u8),
    AllReduce(Part),
}

const GUARD: usize = 64;
const GUARD_BYTE: u8 = 0xA5;

/// Memory between two guards.
#[derive(Debug)]
struct Memory {
    // Sixteen-byte words, so that it is aligned as a device's is.
    words: Vec<u128>,
    address: u64,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Self {
        let mut words = vec![u128::MAX; (len + 2 * GUARD).div_ceil(16)];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        bytes[..GUARD].fill(GUARD_BYTE);
        bytes[GUARD + len..].fill(GUARD_BYTE);
        let address = bytes[GUARD..].as_mut_ptr() as u64;
        Self { words, address, len }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let whole = bytes[..GUARD].iter().chain(&bytes[GUARD + self.len..]).all(|&byte| byte == GUARD_BYTE);
        if !whole && !std::thread::panicking() {
            panic!("a kernel wrote outside a buffer of {} bytes", self.len);
        }
    }
}

impl Allocation for Memory {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// All the memory that was reserved, of which `len` bytes count.
#[derive(Debug)]
struct Reserved {
    memory: Memory,
    len: usize,
}

impl Growable for Reserved {
    fn address(&self) -> u64 {
        self.memory.address
    }

    fn len(&self) -> usize {
        self.len
    }

    fn resize(&mut self, len: usize) -> Result<()> {
        if len > self.memory.len {
            return Err(ZooError::Device(format!("there is no room for {len} bytes")));
        }
        let from = len.min(self.len);
        // What was given back, and what is new, holds nothing.
        let part = Part { address: self.memory.address + from as u64, len: self.memory.len - from };
        // SAFETY: inside `memory`, which nothing else borrows: kernels run only inside calls of the device.
        unsafe { bytes_mut(part) }.fill(0xFF);
        self.len = len;
        Ok(())
    }
}

/// # Safety
/// The part is live, and nothing else reads or writes it meanwhile.
unsafe fn bytes_mut<'a>(part: Part) -> &'a mut [u8] {
    if part.len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(part.address as *mut u8, part.len) }
}

impl Emulated {
    /// A device that runs in `order`.
    pub fn new(order: Order) -> Self {
        Self { order, recording: Arc::default(), multiprocessors: 4, group: None }
    }

    /// Devices that share a model; each runs on a thread of its own.
    pub fn group(order: Order, size: usize) -> Vec<Self> {
        let group = Arc::new(Group { barrier: Barrier::new(size), sum: Mutex::default() });
        let shard = |rank| Shard { rank, size };
        (0..size)
            .map(|rank| Self { group: Some((shard(rank), Arc::clone(&group))), ..Self::new(order) })
            .collect()
    }

    /// Runs `work`, or records it.
    fn take(&self, work: Work) -> Result<()> {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        match recording.as_mut() {
            Some(recorded) => {
                recorded.push(work);
                Ok(())
            }
            None => self.run(&work),
        }
    }

    fn run(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch { kernel, grid, threads, shared, params } => {
                let name = CString::new(*kernel).map_err(|e| ZooError::Device(e.to_string()))?;
                // Kernels take their parameter by value, aligned.
                let mut aligned = vec![0u128; params.len().div_ceil(16)];
                bytemuck::cast_slice_mut::<_, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
                let downwards = c_int::from(self.order == Order::Downwards);
                let params = (aligned.as_ptr().cast(), params.len() as u32);
                // SAFETY: whoever launched it promised that its parameters are the kernel's and point to live memory.
                let wrong = unsafe {
                    rheostat_emulate_launch(
                        name.as_ptr(),
                        grid.as_ptr(),
                        *threads,
                        *shared,
                        params.0,
                        params.1,
                        downwards,
                    )
                };
                if wrong.is_null() {
                    return Ok(());
                }
                // SAFETY: a string literal of the emulator.
                let wrong = unsafe { CStr::from_ptr(wrong) };
                Err(ZooError::Device(format!("{kernel}: {}", wrong.to_string_lossy())))
            }
            Work::Gemm(gemm) => {
                multiply(gemm);
                Ok(())
            }
            Work::Copy(from, to) => {
                // SAFETY: parts were checked against their buffers, which callers keep; kernels run only inside
                // calls of the device. `copy` allows them to overlap.
                unsafe { std::ptr::copy(from.address as *const u8, to.address as *mut u8, from.len) };
                Ok(())
            }
            Work::Fill(part, byte) => {
                // SAFETY: as above.
                unsafe { bytes_mut(*part) }.fill(*byte);
                Ok(())
            }
            Work::AllReduce(part) => {
                if let Some((shard, group)) = &self.group {
                    group.sum(*shard, *part);
                }
                Ok(())
            }
        }
    }
}

impl Group {
    /// Ranks add in their order, so that all of them, and every run, get the same bits.
    fn sum(&self, shard: Shard, part: Part) {
        // SAFETY: a checked part of a live buffer of this rank, which no kernel uses meanwhile.
        let own: &mut [f32] = bytemuck::cast_slice_mut(unsafe { bytes_mut(part) });
        let lock = || self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        for rank in 0..shard.size {
            if rank == shard.rank {
                let mut sum = lock();
                if rank == 0 {
                    sum.clear();
                    sum.resize(own.len(), 0.0);
                }
                sum.iter_mut().zip(own.iter()).for_each(|(sum, own)| *sum += own);
            }
            self.barrier.wait();
        }
        own.copy_from_slice(&lock());
        self.barrier.wait();
    }
}

fn multiply(gemm: &Gemm) {
    let [m, n, k] = gemm.size;
    // SAFETY: live parts of at least these lengths, checked by `gemm`; the output overlaps no input.
    let (x, w, y) = unsafe { (bytes_mut(gemm.x), bytes_mut(gemm.w), bytes_mut(gemm.y)) };
    let values = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    };
    let (x, w) = (values(&x[..2 * m * k]), values(&w[..2 * n * k]));
    for (i, x) in x.chunks_exact(k).enumerate() {
        for (j, w) in w.chunks_exact(k).enumerate() {
            let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let at = i * n + j;
            match gemm.output {
                Output::Half => y[2 * at..2 * at + 2].copy_from_slice(&bf16::from_f32(sum).to_le_bytes()),
                Output::Float => y[4 * at..4 * at + 4].copy_from_slice(&sum.to_le_bytes()),
                Output::Add => {
                    let own: [u8; 4] = std::array::from_fn(|byte| y[4 * at + byte]);
                    y[4 * at..4 * at + 4].copy_from_slice(&(f32::from_le_bytes(own) + sum).to_le_bytes());
                }
            }
        }
    }
}

#[derive(Debug)]
struct Recorded {
    device: Emulated,
    work: Vec<Work>,
}

impl Graph for Recorded {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.device.run(work))
    }
}

impl Device for Emulated {
    fn name(&self) -> String {
        "emulated device".into()
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn block_memory(&self) -> usize {
        227 << 10
    }

    fn runs_together(&self) -> bool {
        false
    }

    fn copies_tiles(&self) -> bool {
        true
    }

    fn tile_map(&self, matrix: Part, rows: usize, cols: usize) -> Result<TileMap> {
        // Kernels follow the matrix itself here.
        need("a matrix", matrix, 2 * rows * cols)?;
        Ok([0; 16])
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((64 << 20, 64 << 20))
    }

    fn alloc(&self, len: usize) -> Result<Buffer> {
        Ok(Arc::new(Memory::new(len)))
    }

    fn reserve(&self, most: usize) -> Result<Box<dyn Growable>> {
        Ok(Box::new(Reserved { memory: Memory::new(most), len: 0 }))
    }

    fn upload(&self, to: Part, bytes: &[u8]) -> Result<()> {
        let to = to.slice(0, bytes.len())?;
        // SAFETY: a checked part of a live buffer, which no kernel uses outside calls of the device.
        unsafe { bytes_mut(to) }.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: Part, bytes: &mut [u8]) -> Result<()> {
        let from = from.slice(0, bytes.len())?;
        // SAFETY: as in `upload`.
        bytes.copy_from_slice(unsafe { bytes_mut(from) });
        Ok(())
    }

    fn copy(&self, from: Part, to: Part) -> Result<()> {
        if from.len != to.len {
            return Err(ZooError::Device(format!("a copy of {} bytes to {}", from.len, to.len)));
        }
        self.take(Work::Copy(from, to))
    }

    fn fill(&self, part: Part, byte: u8) -> Result<()> {
        self.take(Work::Fill(part, byte))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, threads, shared, params, together } = *launch;
        if together {
            return Err(ZooError::Device("blocks of the emulated device run one after another".into()));
        }
        self.take(Work::Launch { kernel, grid, threads, shared, params: params.to_vec() })
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        gemm.check()?;
        self.take(Work::Gemm(*gemm))
    }

    fn begin_capture(&self) -> Result<()> {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        let recorded = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        let work = recorded.ok_or_else(|| ZooError::Device("nothing was recorded".into()))?;
        Ok(Box::new(Recorded { device: self.clone(), work }))
    }

    fn shard(&self) -> Shard {
        self.group.as_ref().map_or(Shard::WHOLE, |(shard, _)| *shard)
    }

    fn all_reduce(&self, part: Part) -> Result<()> {
        self.take(Work::AllReduce(part))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
