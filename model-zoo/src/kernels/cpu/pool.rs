//! A fork-join pool for regions of a few microseconds.
//!
//! A forward pass has some two hundred parallel regions a token, so that handing a region to sleeping
//! threads would cost more than the region. Workers spin for a while after a region, and park when nothing
//! comes. Chunks are claimed from one counter, and the caller waits for *chunks*, never for workers: a worker
//! that has lost its core, or is still waking up, holds up a region only by the chunk it is at, and not at all
//! when it is at none.
//!
//! # Why this is sound
//!
//! `left` counts the chunks that nobody has claimed. A claim is a `fetch_sub` that found it above 0; a region
//! with an unclaimed chunk cannot have ended, so that whoever holds a claim holds one of the region that is
//! open *now*, however late it comes. From that follows all else:
//!
//! - *`job` is read after a claim and written between regions only.* The owner writes it before it stores
//!   `left` (release); a claim reads from that store or from the claims after it, which continue its release
//!   sequence (acquire). The owner writes it again only after `done` has told of every claim of others.
//! - *`body` outlives its uses.* A claim is used before it is added to `done` (release), and the owner returns
//!   after it has read (acquire) as many in `done` as it did not run itself, also when a chunk panicked.
//! - *No chunk runs twice or never.* `left` goes from `chunks` down by ones, and each value above 0 is seen by
//!   one `fetch_sub`. One that comes too late finds 0 or less; what it takes off below 0 is overwritten by the
//!   next region's store, and in between it hides nothing, because nothing is there to claim. A worker looks
//!   before it takes, so that it goes below 0 at most once for each time it saw work.
//! - *`done` belongs to one region.* A worker adds to it once it finds nothing left to claim. Until then its
//!   region cannot end, so that what it adds was claimed in the region that is still open, and the owner's
//!   reset to 0 meets no addition.
//! - *No wake-up is lost.* A worker says that it sleeps and then looks at `left`; the owner stores `left` and
//!   then looks whether one sleeps, all of it `SeqCst`: one of the two sees the other. It looks and waits
//!   under the lock that the owner takes to wake it. A wake-up that comes after the region has ended only
//!   costs its time.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker without work looks for some before it parks: longer than what the engine does between two
/// steps, because waking a parked worker costs a step a tenth of its time.
const PARK_AFTER: Duration = Duration::from_micros(500);
/// Spins between two looks at the clock, which cost more than a spin.
const SPINS: u32 = 64;

type Region = dyn Fn(usize) + Sync;

/// One region: its body, and how many chunks it has.
#[derive(Clone, Copy)]
struct Job {
    body: *const Region,
    chunks: usize,
}

/// Keeps what is written by different threads apart: the prefetcher fetches lines of 64 bytes in pairs.
#[repr(align(128))]
struct Apart<T>(T);

/// What the owner writes to open a region.
struct Open {
    /// Chunks that nobody has claimed; 0 or less when there is none.
    left: AtomicIsize,
    job: UnsafeCell<Option<Job>>,
}

struct Shared {
    open: Apart<Open>,
    /// Chunks of the open region that workers have run.
    done: Apart<AtomicUsize>,
    /// A worker is parked, or about to be.
    sleeping: Apart<AtomicBool>,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    /// What the first chunk that panicked in a region said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only part that is not `Sync` by itself; see the module's text for who reads and writes it
// when. Its pointer is used only while the region's owner waits.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
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
            open: Apart(Open { left: AtomicIsize::new(0), job: UnsafeCell::new(None) }),
            done: Apart(AtomicUsize::new(0)),
            sleeping: Apart(AtomicBool::new(false)),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
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

    /// Runs `body(0)` … `body(chunks - 1)`, at once and begun in this order, and returns when all are done.
    ///
    /// # Panics
    /// As the first chunk that panicked, after every other has ended.
    pub fn run(&self, chunks: usize, body: impl Fn(usize) + Sync) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(body);
            return;
        }
        let body: &(dyn Fn(usize) + Sync + '_) = &body;
        // SAFETY: only the lifetime is erased. Workers use the reference while they hold a claim, and this
        // function returns, or unwinds, after `join` has seen all claims returned. Nothing before that unwinds:
        // `run_chunks` catches what the chunks throw.
        let body: *const Region = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Region>(std::ptr::from_ref(body))
        };
        let shared = &*self.shared;
        shared.open(Job { body, chunks });
        let own = shared.run_chunks();
        shared.join(chunks - own);
        let panic = locked(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Opens a region. The last one has been joined.
    fn open(&self, job: Job) {
        let Open { left, job: place } = &self.open.0;
        // SAFETY: no region is open, so that nobody holds a claim and reads `job`.
        unsafe { *place.get() = Some(job) };
        self.done.0.store(0, Ordering::Relaxed);
        left.store(isize::try_from(job.chunks).unwrap_or(isize::MAX), Ordering::SeqCst);
        if self.sleeping.0.load(Ordering::SeqCst) {
            self.wake_all();
        }
    }

    /// Wakes parked workers, once for each time that one has parked.
    fn wake_all(&self) {
        let _guard = locked(&self.lock);
        self.sleeping.0.store(false, Ordering::SeqCst);
        self.wake.notify_all();
    }

    /// The body and the number of a chunk of the open region, which the caller has to run.
    fn claim(&self) -> Option<(*const Region, usize)> {
        let Open { left, job } = &self.open.0;
        if left.load(Ordering::Relaxed) <= 0 {
            return None;
        }
        let left = usize::try_from(left.fetch_sub(1, Ordering::Acquire)).ok().filter(|left| *left > 0)?;
        // SAFETY: the claim keeps its region open, and the owner leaves `job` alone until it is returned.
        let job = unsafe { *job.get() }?;
        Some((job.body, job.chunks - left))
    }

    /// Runs chunks until none is left to claim, and returns how many.
    fn run_chunks(&self) -> usize {
        let mut count = 0;
        while let Some((body, chunk)) = self.claim() {
            // SAFETY: the claim keeps the region open, and with it `body` alive.
            let body = unsafe { &*body };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(chunk))) {
                locked(&self.panic).get_or_insert(panic);
            }
            count += 1;
        }
        count
    }

    /// Waits until workers have run `chunks` chunks of the open region.
    fn join(&self, chunks: usize) {
        let mut spins = 0u32;
        while self.done.0.load(Ordering::Acquire) != chunks {
            spins = spins.wrapping_add(1);
            // A worker may have lost its core in a chunk: after a while, let it have this one.
            if spins.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }

    fn has_work(&self, ordering: Ordering) -> bool {
        self.open.0.left.load(ordering) > 0
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A worker's life.
fn work(shared: &Shared) {
    while wait_for_work(shared) {
        let count = shared.run_chunks();
        if count > 0 {
            shared.done.0.fetch_add(count, Ordering::Release);
        }
    }
}

/// Returns when there may be chunks to claim: `true`, or when the pool is dropped: `false`.
fn wait_for_work(shared: &Shared) -> bool {
    let mut since = None;
    loop {
        for _ in 0..SPINS {
            if shared.has_work(Ordering::Relaxed) {
                return true;
            }
            std::hint::spin_loop();
        }
        if shared.stop.load(Ordering::Relaxed) {
            return false;
        }
        if since.get_or_insert_with(Instant::now).elapsed() > PARK_AFTER {
            return park(shared);
        }
    }
}

fn park(shared: &Shared) -> bool {
    let mut guard = locked(&shared.lock);
    loop {
        // Said anew after every wake-up, because the owner takes it back with each.
        shared.sleeping.0.store(true, Ordering::SeqCst);
        if shared.has_work(Ordering::SeqCst) {
            return true;
        }
        if shared.stop.load(Ordering::SeqCst) {
            return false;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    }
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
            let run = AssertUnwindSafe(|| pool.run(8, |i| assert!(i != 5, "the fifth")));
            let said = catch_unwind(run).expect_err("a panic");
            assert_eq!(said.downcast_ref::<&str>(), Some(&"the fifth"));
            let sum = AtomicUsize::new(0);
            pool.run(10, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    /// Regions of the caller's stack, many times more threads than cores, so that workers lose their core
    /// everywhere: every region's sums are right, and no worker meets a region that has ended.
    #[test]
    fn late_workers_find_the_open_region_or_none() {
        let pool = Pool::new(16);
        for round in 0..20_000usize {
            let chunks = 2 + round % 7;
            let mut out = vec![0usize; chunks];
            let canary = AtomicUsize::new(round);
            {
                let parts = Disjoint::new(&mut out);
                pool.run(chunks, |i| {
                    // SAFETY: a part belongs to one chunk.
                    let part = unsafe { parts.part(i, 1) };
                    part[0] += canary.load(Ordering::Relaxed) + i;
                });
            }
            assert!(out.iter().enumerate().all(|(i, v)| *v == round + i), "{round}: {out:?}");
            canary.store(usize::MAX, Ordering::Relaxed);
            // Now and then long enough for workers to park, so that waking races with the next region.
            if round % 512 == 0 {
                let begin = Instant::now();
                while begin.elapsed() < 2 * PARK_AFTER {
                    std::hint::spin_loop();
                }
            }
        }
    }

    /// The defect that this pool once had: a region waited for workers that had not begun on it.
    #[test]
    fn a_region_ends_without_a_worker_that_never_comes() {
        let mut pool = Pool::new(1);
        let (release, released) = std::sync::mpsc::sync_channel::<()>(1);
        pool.workers.push(std::thread::spawn(move || _ = released.recv()));
        let sum = AtomicUsize::new(0);
        for _ in 0..10 {
            pool.run(100, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 49_500);
        drop(release);
    }
}
