//! Products of many rows, by cuBLASLt. Its choice of algorithm is kept for each size.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use super::super::device::{Allocation, Gemm, Output};
use super::memory::Memory;
use super::{Context, is_float};
use crate::{Result, ZooError};

/// Bytes of scratch memory that an algorithm may use: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `CUBLAS_OP_T`, of cuBLAS's own header.
const OP_T: i32 = 1;

/// By size and output.
type Plans = HashMap<([usize; 3], Output), Arc<Plan>>;

#[derive(Debug)]
pub(super) struct Lt {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    plans: Mutex<Plans>,
}

// SAFETY: cuBLASLt's handle may be used from any thread.
unsafe impl Send for Lt {}
// SAFETY: as above, and from several at once.
unsafe impl Sync for Lt {}

/// Descriptions of a product, and the algorithm for it.
#[derive(Debug)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: plain descriptions, which nothing changes once they are made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

fn failed(error: CublasError) -> ZooError {
    ZooError::Device(format!("cuBLASLt failed: {error:?}"))
}

impl Lt {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle, workspace: Memory::new(context, WORKSPACE)?, plans: Mutex::default() })
    }

    /// Multiplies in `stream`. To cuBLAS, whose matrices lie by columns, `y` is `n × m`: `wᵀ` of a `k × n` matrix times
    /// a `k × m` one.
    pub(super) fn multiply(&self, gemm: &Gemm, stream: CUstream) -> Result<()> {
        let plan = self.plan(gemm)?;
        let (alpha, beta) = (1f32, if gemm.output == Output::Add { 1f32 } else { 0f32 });
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        let [w, x, y] = plan.layouts;
        let out = gemm.y.pointer() as *mut c_void;
        // SAFETY: live descriptions of these sizes, and parts that `Gemm::check` has found long enough. The scalars are
        // read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                scalar(&alpha),
                scalar(&beta),
                gemm.w.pointer() as *const c_void,
                w,
                gemm.x.pointer() as *const c_void,
                x,
                out.cast_const(),
                y,
                out,
                y,
                &plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed)
    }

    fn plan(&self, gemm: &Gemm) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (gemm.size, gemm.output);
        if let Some(plan) = plans.get(&key) {
            return Ok(Arc::clone(plan));
        }
        let plan = Arc::new(self.describe(gemm).map_err(failed)?);
        plans.insert(key, Arc::clone(&plan));
        Ok(plan)
    }

    fn describe(&self, gemm: &Gemm) -> Result<Plan, CublasError> {
        let [m, n, k] = gemm.size;
        let half = sys::cudaDataType_t::CUDA_R_16BF;
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let operation = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
        let layout = |kind, rows: usize, cols: usize| {
            result::create_matrix_layout(kind, rows as u64, cols as u64, rows as i64)
        };
        let out = if is_float(gemm.output) { float } else { half };
        let layouts = [layout(half, k, n)?, layout(half, k, m)?, layout(out, n, m)?];
        let transposed = OP_T;
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE;
        // SAFETY: live descriptions; attributes are copied by the calls.
        let chosen = unsafe {
            result::set_matmul_desc_attribute(
                operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )?;
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of_val(&workspace),
            )?;
            let [w, x, y] = layouts;
            let chosen = result::get_matmul_algo_heuristic(self.handle, operation, w, x, y, y, preference);
            result::destroy_matmul_pref(preference)?;
            chosen?
        };
        Ok(Plan { operation, layouts, algorithm: chosen.algo })
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        let plans = self.plans.lock().map(|mut plans| std::mem::take(&mut *plans)).unwrap_or_default();
        for plan in plans.values() {
            // SAFETY: made by `describe`, and nothing holds them any more.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.operation);
                for layout in plan.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
