//! Memory of a GPU.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::super::device::{Allocation, Growable};
use super::{Context, failed};
use crate::{Result, ZooError};

/// An allocation.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<Context>,
    address: u64,
    len: usize,
}

impl Memory {
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Result<Self> {
        context.enter()?;
        // SAFETY: a context is current. No bytes are asked for as some, because the driver refuses to.
        let address = unsafe { result::malloc_sync(len.max(1)) };
        let address = address.map_err(|error| {
            ZooError::Device(format!("the GPU has no {len} bytes of memory to give: {error:?}"))
        })?;
        Ok(Self { context: Arc::clone(context), address, len })
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

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing else holds the address; kernels that use it are waited for.
        let freed = unsafe {
            result::ctx::set_current(self.context.context)
                .and_then(|()| result::stream::synchronize(self.context.stream))
                .and_then(|()| result::free_sync(self.address))
        };
        if let Err(error) = freed {
            tracing::warn!(?error, "memory of the GPU was not freed");
        }
    }
}

/// A range of addresses, the beginning of which is backed by memory in chunks.
#[derive(Debug)]
pub(super) struct Reserved {
    context: Arc<Context>,
    address: u64,
    most: usize,
    /// Bytes of a chunk.
    chunk: usize,
    handles: Vec<sys::CUmemGenericAllocationHandle>,
    len: usize,
}

/// Bytes of a chunk, about: what a pool that shrinks gives back at once.
const CHUNK: usize = 32 << 20;

impl Reserved {
    pub(super) fn new(context: &Arc<Context>, most: usize) -> Result<Self> {
        context.enter()?;
        let properties = properties(context);
        let (mut granularity, mut address) = (0usize, 0u64);
        let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: out-pointers to locals, and properties of a live device.
        unsafe { sys::cuMemGetAllocationGranularity(&mut granularity, &properties, least) }
            .result()
            .map_err(failed("memory"))?;
        let chunk = CHUNK.next_multiple_of(granularity.max(1));
        let most = most.max(1).next_multiple_of(chunk);
        // SAFETY: an out-pointer to a local.
        unsafe { sys::cuMemAddressReserve(&mut address, most, 0, 0, 0) }
            .result()
            .map_err(failed("addresses"))?;
        Ok(Self { context: Arc::clone(context), address, most, chunk, handles: Vec::new(), len: 0 })
    }

    fn push(&mut self) -> Result<()> {
        let properties = properties(&self.context);
        let at = self.address + (self.handles.len() * self.chunk) as u64;
        let mut handle = 0;
        // SAFETY: an out-pointer to a local, and properties of a live device.
        unsafe { sys::cuMemCreate(&mut handle, self.chunk, &properties, 0) }
            .result()
            .map_err(failed("memory"))?;
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location: properties.location, flags };
        // SAFETY: the chunk at `at` lies in the reserved range and is not mapped yet.
        let mapped = unsafe {
            sys::cuMemMap(at, self.chunk, 0, handle, 0)
                .result()
                .and_then(|()| sys::cuMemSetAccess(at, self.chunk, &access, 1).result())
        };
        if let Err(error) = mapped {
            // SAFETY: the handle of above, which nothing holds.
            let _ = unsafe { sys::cuMemRelease(handle) };
            return Err(failed("mapping memory")(error));
        }
        self.handles.push(handle);
        Ok(())
    }

    fn pop(&mut self) {
        let Some(handle) = self.handles.pop() else { return };
        let at = self.address + (self.handles.len() * self.chunk) as u64;
        // SAFETY: the last chunk, mapped by `push`; its users have been waited for.
        let freed = unsafe {
            sys::cuMemUnmap(at, self.chunk).result().and_then(|()| sys::cuMemRelease(handle).result())
        };
        if let Err(error) = freed {
            tracing::warn!(?error, "memory of the GPU was not given back");
        }
    }
}

fn properties(context: &Context) -> sys::CUmemAllocationProp {
    // SAFETY: integers, enumerations with a member 0, and a pointer.
    let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = context.device;
    properties
}

impl Growable for Reserved {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> usize {
        self.len
    }

    fn resize(&mut self, len: usize) -> Result<()> {
        if len > self.most {
            return Err(ZooError::Device(format!("{len} bytes do not fit the GPU's {}", self.most)));
        }
        self.context.synchronize()?;
        let (wanted, before) = (len.div_ceil(self.chunk), self.handles.len());
        while self.handles.len() < wanted {
            if let Err(error) = self.push() {
                while self.handles.len() > before {
                    self.pop();
                }
                return Err(error);
            }
        }
        while self.handles.len() > wanted {
            self.pop();
        }
        self.len = len;
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = self.context.synchronize() {
            tracing::warn!(%error, "memory of the GPU is given back while it fails");
        }
        while !self.handles.is_empty() {
            self.pop();
        }
        // SAFETY: the range of `new`, of which nothing is mapped any more.
        if let Err(error) = unsafe { sys::cuMemAddressFree(self.address, self.most) }.result() {
            tracing::warn!(?error, "addresses of the GPU were not freed");
        }
    }
}
