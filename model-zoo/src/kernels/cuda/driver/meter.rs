//! The GPU's energy counter, through NVML.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

use libloading::Library;

/// An opened counter. NVML counts GPUs as the driver does, unless CUDA_VISIBLE_DEVICES hides some: its first entry is
/// taken for GPU 0 then, where it is a number.
#[derive(Debug)]
pub(super) struct Meter {
    library: Library,
    /// An NVML handle, as a number, so that it may go from thread to thread.
    device: usize,
}

type Init = unsafe extern "C" fn() -> c_int;
type ByIndex = unsafe extern "C" fn(c_uint, *mut *mut c_void) -> c_int;
type Energy = unsafe extern "C" fn(*mut c_void, *mut c_ulonglong) -> c_int;

impl Meter {
    /// The counter of GPU `index`; `None` where NVML is missing or has none.
    pub(super) fn open(index: u32) -> Option<Self> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let index =
            visible.split(',').nth(index as usize).and_then(|i| i.trim().parse().ok()).unwrap_or(index);
        let mut device = std::ptr::null_mut();
        // SAFETY: NVML's library, and its functions by their documented types; the out-pointer is a local's.
        let library = unsafe {
            let library = Library::new("libnvidia-ml.so.1").ok()?;
            let init = library.get::<Init>(b"nvmlInit_v2\0").ok()?;
            let by_index = library.get::<ByIndex>(b"nvmlDeviceGetHandleByIndex_v2\0").ok()?;
            if init() != 0 || by_index(index, &mut device) != 0 {
                return None;
            }
            library
        };
        let meter = Self { library, device: device as usize };
        meter.joules().map(|_| meter)
    }

    /// Joules since the driver was loaded.
    pub(super) fn joules(&self) -> Option<f64> {
        let mut millijoules = 0;
        // SAFETY: as in `open`; the handle is NVML's, which stays initialised.
        let status = unsafe {
            let energy = self.library.get::<Energy>(b"nvmlDeviceGetTotalEnergyConsumption\0").ok()?;
            energy(self.device as *mut c_void, &mut millijoules)
        };
        (status == 0).then_some(millijoules as f64 / 1e3)
    }
}
