//! A fork-join pool for regions of a few microseconds.
//!
//! A forward pass has some two hundred parallel regions a token, so that handing a region to sleeping
//! threads would cost more than the region. Workers spin for a while after a region, and park only when
//! the engine has nothing to run. Chunks are claimed from a counter, so that a thread that loses its core
//! for a moment holds up no more than one chunk.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Spins of a worker before it parks: some 50 µs.
const SPINS_BEFORE_PARK: u32 = 20_000;

type Region = dyn Fn(usize) + Sync;

/// One region: its body, and how many chunks it has.
#[derive(Clone, Copy)]
struct Job {
    body: *const Region,
    chunks: usize,
}

struct Shared {
    /// Written by the owner while no region runs; read by workers after they saw `epoch` change.
    job: UnsafeCell<Option<Job>>,
    /// Counts regions. A change tells workers that `job` is theirs to run.
    epoch: AtomicUsize,
    /// The next chunk to claim.
    next: AtomicUsize,
    /// Workers that have not finished the current region.
    busy: AtomicUsize,
    parked: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the pool's owner (`&mut self`-like exclusivity is kept by `Pool` being
// !Sync) while `busy` is 0, and read by workers only between an `epoch` change and their `busy` decrement.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is dereferenced only while the region's owner waits for it.
unsafe impl Send for Shared {}

/// Threads that run regions together with the caller.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Regions do not nest and have one caller: keeps `Pool` from being shared between threads.
    _not_sync: std::marker::PhantomData<std::cell::Cell<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller included; at least 1.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("compute-{index}")).spawn(move || work(&shared)).ok()
            })
            .collect();
        Self { shared, workers, _not_sync: std::marker::PhantomData }
    }

    /// Threads that run a region, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(0)` … `body(chunks - 1)`, in any order and at once, and returns when all are done.
    ///
    /// # Panics
    /// When a chunk panicked, after every other has ended.
    pub fn run(&self, chunks: usize, body: impl Fn(usize) + Sync) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(body);
            return;
        }
        let shared = &*self.shared;
        let body: &(dyn Fn(usize) + Sync + '_) = &body;
        // SAFETY: only the lifetime is erased. Workers use the reference until they decrement `busy`, and
        // this function returns (or unwinds, through `Join`) only after `busy` is 0.
        let body: *const Region = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Region>(std::ptr::from_ref(body))
        };
        // SAFETY: `busy` is 0 here (the last region was joined), so that no worker reads `job`.
        unsafe { *shared.job.get() = Some(Job { body, chunks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        {
            let _join = Join(shared);
            claim(shared, body, chunks);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Waits for the workers of a region when it goes out of scope, by return or by panic.
struct Join<'a>(&'a Shared);

impl Drop for Join<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            spins = spins.wrapping_add(1);
            // A worker may have lost its core: after a while, let it have this one.
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

fn claim(shared: &Shared, body: *const Region, chunks: usize) {
    loop {
        let chunk = shared.next.fetch_add(1, Ordering::Relaxed);
        if chunk >= chunks {
            return;
        }
        // SAFETY: the region's owner keeps `body` alive until `busy` is 0, which is after this call.
        unsafe { (*body)(chunk) };
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    while let Some(epoch) = next_epoch(shared, seen) {
        seen = epoch;
        // SAFETY: `epoch` changed and this worker has not decremented `busy`: the owner leaves `job` alone.
        if let Some(job) = unsafe { *shared.job.get() } {
            let run = std::panic::AssertUnwindSafe(|| claim(shared, job.body, job.chunks));
            if std::panic::catch_unwind(run).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

/// The epoch after `seen`, or `None` when the pool is dropped.
fn next_epoch(shared: &Shared, seen: usize) -> Option<usize> {
    for _ in 0..SPINS_BEFORE_PARK {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return Some(epoch);
        }
        if shared.stop.load(Ordering::Relaxed) {
            return None;
        }
        std::hint::spin_loop();
    }
    let mut guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
    shared.parked.fetch_add(1, Ordering::SeqCst);
    let found = loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            break Some(epoch);
        }
        if shared.stop.load(Ordering::SeqCst) {
            break None;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    };
    shared.parked.fetch_sub(1, Ordering::SeqCst);
    found
}

/// A slice whose disjoint parts are written by the chunks of one region.
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: chunks only get parts that their caller promises to be disjoint (see `part`).
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _borrow: std::marker::PhantomData }
    }

    /// The part `[start, start + len)`, bounds checked.
    ///
    /// # Safety
    /// No two live parts overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part outside the slice");
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise, alive by `_borrow`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once_and_panics_are_joined() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for chunks in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=20 {
                    pool.run(chunks, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
                }
            }
            let run = std::panic::AssertUnwindSafe(|| pool.run(8, |i| assert!(i != 5)));
            assert!(std::panic::catch_unwind(run).is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
