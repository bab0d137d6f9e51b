//! An NVIDIA GPU, through the driver's library and cuBLASLt, which are opened when a device is.
//!
//! All work goes into one stream. The kernels are in the binary, as machine code of the architectures that it was built
//! for and as PTX that the driver compiles for later ones.

mod lt;
mod memory;
mod meter;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::device::{Buffer, Device, Gemm, Graph, Growable, Launch, Output, Part, TileMap};
use super::ops::need;
use crate::{Result, ZooError};
use lt::Lt;

/// As the driver wants an image to lie.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

/// The kernels, as build.rs compiled them.
static KERNELS: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// A GPU. Its handle may go from thread to thread; calls make its context the thread's own.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<Context>,
    lt: Lt,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
    name: String,
    multiprocessors: u32,
    /// Bytes of shared memory that a block may have.
    shared: i32,
    /// Whether it is a Hopper or later: kernels start while those before them end (see `follow` in `common.cuh`), and
    /// copy by tiles.
    is_hopper: bool,
    meter: Option<meter::Meter>,
}

/// The device's context and the stream that all work is in.
#[derive(Debug)]
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: handles of the driver may be used from any thread whose current context is theirs, which every call sees to.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's calls lock what they share.
unsafe impl Sync for Context {}
// SAFETY: as `Context`; functions are looked up behind a lock.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

fn failed(what: &str) -> impl Fn(DriverError) -> ZooError + '_ {
    move |error| ZooError::Device(format!("the GPU failed ({what}): {error:?}"))
}

impl Gpu {
    /// The GPU of this index, from 0.
    ///
    /// # Errors
    /// [`ZooError::Device`] when there is none, or a library is missing: what is missing and what to do.
    pub fn open(index: usize) -> Result<Self> {
        // SAFETY: opens libraries by name, whose initialisers are NVIDIA's.
        let (driver, blas) = unsafe { (sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()) };
        let missing = |what: &str| Err(ZooError::Device(what.into()));
        if !driver {
            return missing(
                "there is no NVIDIA driver on this machine (libcuda.so.1 cannot be opened); use device = \"cpu\"",
            );
        }
        result::init().map_err(failed("start"))?;
        let count = result::device::get_count().map_err(failed("count"))?;
        if index as i64 >= i64::from(count) {
            return Err(ZooError::Device(format!("there is no GPU {index}: the NVIDIA driver sees {count}")));
        }
        if !blas {
            return missing(
                "libcublasLt.so.13 cannot be opened: install NVIDIA's cuBLAS, or put its folder on LD_LIBRARY_PATH",
            );
        }
        let context = Arc::new(Context::new(index as i32)?);
        context.enter()?;
        // SAFETY: the image is a whole fat binary, and the context is current.
        let module = unsafe { result::module::load_data(KERNELS.0.as_ptr().cast()) }
            .map_err(failed("loading kernels; the driver must be of CUDA 13"))?;
        let name = result::device::get_name(context.device).map_err(failed("name"))?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        // SAFETY: a device of `get`.
        let attribute = |which| unsafe { result::device::get_attribute(context.device, which) };
        let multiprocessors = attribute(count).map_err(failed("size"))? as u32;
        let shared = attribute(shared).map_err(failed("size"))?;
        let major = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let is_hopper = attribute(major).map_err(failed("architecture"))? >= 9;
        let lt = Lt::new(&context)?;
        let meter = meter::Meter::open(index as u32);
        Ok(Self {
            meter,
            context,
            lt,
            module,
            functions: Mutex::default(),
            name,
            multiprocessors,
            shared,
            is_hopper,
        })
    }

    fn function(&self, name: &'static str) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(name) {
            return Ok(function);
        }
        let text = CString::new(name).map_err(|e| ZooError::Device(e.to_string()))?;
        // SAFETY: a live module.
        let function = unsafe { result::module::get_function(self.module, text) }.map_err(failed(name))?;
        let shared = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a live function.
        unsafe { result::function::set_function_attribute(function, shared, self.shared) }
            .map_err(failed(name))?;
        functions.insert(name, function);
        Ok(function)
    }
}

impl Context {
    fn new(index: i32) -> Result<Self> {
        let device = result::device::get(index).map_err(failed("device"))?;
        // SAFETY: a device of `get`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("context"))?;
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(context) }.map_err(failed("context"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"))?;
        Ok(Self { device, context, stream })
    }

    /// Makes it the thread's own.
    fn enter(&self) -> Result<()> {
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: a live stream.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("a kernel"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: all that used them is gone: every allocation and graph holds this context.
        let ended = unsafe {
            result::ctx::set_current(self.context)
                .and_then(|()| result::stream::destroy(self.stream))
                .and_then(|()| result::primary_ctx::release(self.device))
        };
        if let Err(error) = ended {
            tracing::warn!(?error, "the GPU's context did not end well");
        }
    }
}

/// A captured step.
#[derive(Debug)]
struct Captured {
    context: Arc<Context>,
    graph: sys::CUgraph,
    ready: sys::CUgraphExec,
}

// SAFETY: as `Context`.
unsafe impl Send for Captured {}

impl Graph for Captured {
    fn replay(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both live; buffers are kept by whoever captured (see `Device::end_capture`).
        unsafe { result::graph::launch(self.ready, self.context.stream) }.map_err(failed("a captured step"))
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: nothing else holds them; a replay that is under way is waited for.
        let ended = unsafe {
            result::ctx::set_current(self.context.context)
                .and_then(|()| result::stream::synchronize(self.context.stream))
                .and_then(|()| result::graph::exec_destroy(self.ready))
                .and_then(|()| result::graph::destroy(self.graph))
        };
        if let Err(error) = ended {
            tracing::warn!(?error, "a captured step did not end well");
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn block_memory(&self) -> usize {
        self.shared as usize
    }

    fn runs_together(&self) -> bool {
        true
    }

    fn copies_tiles(&self) -> bool {
        self.is_hopper
    }

    fn tile_map(&self, matrix: Part, rows: usize, cols: usize) -> Result<TileMap> {
        need("a matrix", matrix, 2 * rows * cols)?;
        self.context.enter()?;
        tile_map(matrix, rows as u64, cols as u64)
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.context.enter()?;
        let (free, total) = result::mem_get_info().map_err(failed("memory"))?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&self, len: usize) -> Result<Buffer> {
        Ok(Arc::new(memory::Memory::new(&self.context, len)?))
    }

    fn reserve(&self, most: usize) -> Result<Box<dyn Growable>> {
        Ok(Box::new(memory::Reserved::new(&self.context, most)?))
    }

    fn upload(&self, to: Part, bytes: &[u8]) -> Result<()> {
        let to = to.slice(0, bytes.len())?;
        self.context.enter()?;
        // SAFETY: a checked part of live memory. From memory that is not pinned the driver returns once it has its
        // own copy of `bytes`.
        unsafe { result::memcpy_htod_async(to.address, bytes, self.context.stream) }.map_err(failed("upload"))
    }

    fn download(&self, from: Part, bytes: &mut [u8]) -> Result<()> {
        let from = from.slice(0, bytes.len())?;
        self.context.enter()?;
        // SAFETY: a checked part of live memory; `bytes` is borrowed until the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(bytes, from.address, self.context.stream) }
            .map_err(failed("download"))?;
        self.context.synchronize()
    }

    fn copy(&self, from: Part, to: Part) -> Result<()> {
        if from.len != to.len {
            return Err(ZooError::Device(format!("a copy of {} bytes to {}", from.len, to.len)));
        }
        self.context.enter()?;
        // SAFETY: checked parts of live memory.
        unsafe { result::memcpy_dtod_async(to.address, from.address, from.len, self.context.stream) }
            .map_err(failed("copy"))
    }

    fn fill(&self, part: Part, byte: u8) -> Result<()> {
        self.context.enter()?;
        // SAFETY: a checked part of live memory.
        unsafe { result::memset_d8_async(part.address, byte, part.len, self.context.stream) }
            .map_err(failed("fill"))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let function = self.function(launch.kernel)?;
        self.context.enter()?;
        // The driver copies the parameter, whose type is eight bytes aligned.
        let mut params = vec![0u64; launch.params.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<_, u8>(&mut params)[..launch.params.len()].copy_from_slice(launch.params);
        let mut pointers = [params.as_mut_ptr().cast::<c_void>()];
        // A launch whose blocks wait for each other has the device for itself.
        let mut attribute = if launch.together { cooperating() } else { overlapping() };
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.context.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(self.is_hopper || launch.together),
        };
        // SAFETY: the caller's promise about the parameter; function, stream and attribute are live.
        unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed(launch.kernel))
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        gemm.check()?;
        self.context.enter()?;
        self.lt.multiply(gemm, self.context.stream)
    }

    fn begin_capture(&self) -> Result<()> {
        self.context.enter()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream.
        unsafe { result::stream::begin_capture(self.context.stream, mode) }.map_err(failed("capture"))
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.context.enter()?;
        // SAFETY: a live stream, and the graph that it gives.
        let (graph, ready) = unsafe {
            let graph = result::stream::end_capture(self.context.stream).map_err(failed("capture"))?;
            let mut ready = std::ptr::null_mut();
            sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result().map_err(failed("capture"))?;
            (graph, ready)
        };
        Ok(Box::new(Captured { context: Arc::clone(&self.context), graph, ready }))
    }

    fn joules(&self) -> Option<f64> {
        self.meter.as_ref()?.joules()
    }

    fn synchronize(&self) -> Result<()> {
        self.context.synchronize()
    }
}

/// Lets a kernel start while the one before it in the stream ends.
fn overlapping() -> sys::CUlaunchAttribute {
    // SAFETY: integers, and a union of plain values of which all zeros are one.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

/// Lets the blocks of a launch wait for each other.
fn cooperating() -> sys::CUlaunchAttribute {
    // SAFETY: as in `overlapping`.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attribute.value.cooperative = 1;
    attribute
}

/// See [`Device::tile_map`]: boxes as `TiledMatrix` in `async.cuh` says.
fn tile_map(matrix: Part, rows: u64, cols: u64) -> Result<TileMap> {
    let (sizes, strides) = ([64, rows, cols / 64], [2 * cols, 128]);
    let (boxes, steps) = ([64u32, 16, 8], [1u32; 3]);
    // SAFETY: opaque words, all of which the call below writes.
    let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    // SAFETY: pointers to locals of three and two values; the matrix is a checked part of live memory.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            matrix.address() as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed("describing a matrix"))?;
    Ok(map.opaque)
}

/// Whether what a product writes is f32.
fn is_float(output: Output) -> bool {
    output != Output::Half
}
