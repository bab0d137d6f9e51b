// The emulated device: fibers, barriers, and the table of kernels.
#include <cstdlib>
#include <sys/mman.h>

#include "emulate.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

constexpr unsigned MAX_THREADS = 1024, WARP = 32, STACK = 128 << 10, SLOT = 32, MOST_YIELDS = 100'000'000;

#if defined(__x86_64__)
// Stores the registers that a call keeps on the stack, changes stacks, and loads them.
extern "C" void rheostat_emulate_switch(void **from, void *to);
asm(R"(
.text
.type rheostat_emulate_switch,@function
rheostat_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size rheostat_emulate_switch, .-rheostat_emulate_switch
)");
using Context = void *;
#else
using Context = ucontext_t;
#endif

enum State : uint8_t { READY, AT_BLOCK, AT_SOME, AT_WARP, DONE };

struct Fiber {
    Context context;
    unsigned char *stack;
    emulate::Place place;
    State state;
    unsigned phase;
};

struct Warp {
    unsigned alive, waiting;
    alignas(16) unsigned char slots[2][WARP][SLOT];
};

// A block that runs.
struct Device {
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    Context scheduler;
    Fiber *current;
    unsigned threads, alive, waiting, waiting_some, yields;
    unsigned char *shared;
    unsigned shared_len;
    void (*run)(const void *);
    const void *params;
    const char *failure;
};

thread_local Device *device = nullptr;
emulate::Entry *entries = nullptr;

void to_scheduler(Device *d) {
#if defined(__x86_64__)
    rheostat_emulate_switch(&d->current->context, d->scheduler);
#else
    swapcontext(&d->current->context, &d->scheduler);
#endif
}

void release_block(Device *d) {
    if (d->waiting == 0 || d->waiting < d->alive) return;
    for (unsigned i = 0; i < d->threads; i++)
        if (d->fibers[i].state == AT_BLOCK) d->fibers[i].state = READY;
    d->waiting = 0;
}

void release_warp(Device *d, unsigned index) {
    Warp &warp = d->warps[index];
    if (warp.waiting == 0 || warp.waiting < warp.alive) return;
    for (unsigned i = index * WARP; i < (index + 1) * WARP; i++)
        if (d->fibers[i].state == AT_WARP) d->fibers[i].state = READY;
    warp.waiting = 0;
}

void body() {
    Device *d = device;
    d->run(d->params);
    Fiber *me = d->current;
    unsigned index = me - d->fibers;
    me->state = DONE;
    d->alive--;
    Warp &warp = d->warps[index / WARP];
    // On a GPU such an exchange reads nothing defined.
    if (warp.waiting > 0) d->failure = "a thread ended while others of its warp wait for it";
    warp.alive--;
    release_warp(d, index / WARP);
    release_block(d);
    to_scheduler(d);
    abort();
}

void prepare(Fiber &fiber) {
    if (fiber.stack == nullptr) {
        void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) abort();
        fiber.stack = static_cast<unsigned char *>(stack);
    }
#if defined(__x86_64__)
    // Six registers, the entry as return address, and a word that keeps calls aligned.
    void **top = reinterpret_cast<void **>(fiber.stack + STACK) - 8;
    memset(top, 0, 8 * sizeof *top);
    top[6] = reinterpret_cast<void *>(&body);
    fiber.context = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
#endif
    fiber.state = READY;
    fiber.phase = 0;
}

void run_block(Device *d, bool downwards) {
    d->alive = d->threads;
    d->waiting = d->waiting_some = d->yields = 0;
    for (unsigned w = 0; w < d->threads / WARP; w++) d->warps[w].alive = WARP, d->warps[w].waiting = 0;
    memset(d->shared, 0xFF, d->shared_len);
    for (unsigned i = 0; i < d->threads; i++) prepare(d->fibers[i]);
    while (d->alive > 0) {
        bool moved = false;
        for (unsigned i = 0; i < d->threads; i++) {
            Fiber &fiber = d->fibers[downwards ? d->threads - 1 - i : i];
            if (fiber.state != READY) continue;
            moved = true;
            d->current = &fiber;
#if defined(__x86_64__)
            rheostat_emulate_switch(&d->scheduler, fiber.context);
#else
            swapcontext(&d->scheduler, &fiber.context);
#endif
            if (d->failure != nullptr) return;
        }
        if (!moved) {
            d->failure = "threads of a block wait at different barriers";
            return;
        }
    }
}

}  // namespace

namespace emulate {

const Place &place() { return device->current->place; }
unsigned char *shared() { return device->shared; }

void sync_block() {
    Device *d = device;
    d->current->state = AT_BLOCK;
    d->waiting++;
    release_block(d);
    if (d->current->state == AT_BLOCK) to_scheduler(d);
}

void sync_some(unsigned threads) {
    Device *d = device;
    d->current->state = AT_SOME;
    if (++d->waiting_some == threads) {
        for (unsigned i = 0; i < d->threads; i++)
            if (d->fibers[i].state == AT_SOME) d->fibers[i].state = READY;
        d->waiting_some = 0;
    } else {
        to_scheduler(d);
    }
}

void yield() {
    Device *d = device;
    if (++d->yields > MOST_YIELDS) d->failure = "threads of a block wait for what nobody does";
    to_scheduler(d);
}

const void *exchange(const void *value, unsigned size, unsigned source) {
    Device *d = device;
    unsigned index = d->current - d->fibers, phase = d->current->phase++ & 1;
    Warp &warp = d->warps[index / WARP];
    if (size > SLOT) abort();
    memcpy(warp.slots[phase][index % WARP], value, size);
    d->current->state = AT_WARP;
    warp.waiting++;
    if (warp.alive < WARP) d->failure = "a warp exchanges values after some of its threads have ended";
    release_warp(d, index / WARP);
    if (d->current->state == AT_WARP) to_scheduler(d);
    return warp.slots[phase][source];
}

Entry::Entry(const char *name, unsigned params, void (*run)(const void *))
    : name(name), params(params), run(run), next(entries) {
    entries = this;
}

}  // namespace emulate

// Runs a kernel to its end. Returns null, or what the kernel did wrong.
extern "C" const char *rheostat_emulate_launch(const char *name, const unsigned grid[3], unsigned threads,
                                               unsigned shared_len, const void *params, unsigned params_len,
                                               int downwards) {
    emulate::Entry *entry = entries;
    while (entry != nullptr && strcmp(entry->name, name) != 0) entry = entry->next;
    if (entry == nullptr) return "there is no such kernel";
    if (entry->params != params_len) return "the kernel's parameters are of another size";
    if (threads == 0 || threads > MAX_THREADS || threads % WARP != 0) return "a block has whole warps, 32 at most";
    if (device == nullptr) device = static_cast<Device *>(calloc(1, sizeof(Device)));
    Device *d = device;
    d->threads = threads;
    d->run = entry->run;
    d->params = params;
    d->failure = nullptr;
    d->shared_len = shared_len;
    d->shared = static_cast<unsigned char *>(aligned_alloc(128, (shared_len + 255) / 128 * 128));
    const unsigned blocks = grid[0] * grid[1] * grid[2];
    for (unsigned i = 0; i < blocks && d->failure == nullptr; i++) {
        unsigned block = downwards ? blocks - 1 - i : i;
        dim3_ index = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        for (unsigned t = 0; t < threads; t++)
            d->fibers[t].place = {{t, 0, 0}, index, {threads, 1, 1}, {grid[0], grid[1], grid[2]}};
        run_block(d, downwards != 0);
    }
    free(d->shared);
    return d->failure;
}

#include "../kernels.cu"
