/* A pool of threads that does well on a machine that others use too.
 *
 * The caller cuts a region of work into pieces, and every thread that is awake, the caller included, claims one after the
 * other: nobody waits for a thread that is not running, unless it was stopped inside of a piece. A thread that finds that
 * the system let others run in its place sleeps for a while, and longer each time this happens again: beside a busy loop
 * on one of two cores, the caller soon works alone on the other. Which thread does a piece changes no bit of its result.
 *
 * The pool does one region at a time; a second caller meanwhile does its own work alone.
 */
#define _GNU_SOURCE
#include "parallel.h"
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define MOST 255          /* threads */
#define ROUNDS 4          /* of pieces, at most */
#define AWAKE 2000        /* microseconds for which a thread waits awake for more work */
#define STOPPED 500       /* microseconds without the CPU after which a thread was stopped in favour of others */
#define SHORTEST_REST 2000 /* microseconds that it then sleeps */
#define LONGEST_REST 64000
#define UNDISTURBED 20000 /* microseconds of work between two rests after which the second is not longer than the first */

typedef struct {
    Work *work;
    void *job;
    long count, step, steps, threads, rounds;
} Region;

/* All of a region that a thread needs to claim a piece, in one number: by whom it may be claimed, the next piece, the
 * number of pieces, and the number of the region, so that nobody claims from a region that is over. */
#define CLAIM(number, pieces, threads) ((uint64_t)(number) << 28 | (uint64_t)(pieces) << 18 | (uint64_t)(threads))
#define NEXT(claim) ((claim) >> 8 & 1023)
#define NUM_PIECES(claim) ((claim) >> 18 & 1023)
#define NUM_THREADS(claim) ((int)((claim)&255))

static struct {
    _Alignas(64) _Atomic uint64_t claim;
    Region *_Atomic region; /* read only by who has claimed a piece of it */
    atomic_int cpu;         /* that the caller runs on, where the system tells */
    _Alignas(64) atomic_int done; /* pieces */
    atomic_int waiting;           /* the caller sleeps until all are done */
    _Alignas(64) atomic_int asleep;
    atomic_int taken; /* a caller has the pool */
    int num_workers;
    pthread_mutex_t lock;
    pthread_cond_t more, finished;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER, .finished = PTHREAD_COND_INITIALIZER};

static long microseconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int current_cpu(void) {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Keeps this thread off the caller's CPU, where it would be in the way: the system often wakes a thread there, though another
 * is idle. Returns 0 where that can't be done. `run_anywhere` ends it, unless somebody else has set the CPUs meanwhile. */
#ifdef __linux__
typedef struct {
    cpu_set_t before, now;
} Kept;

static int keep_off_caller(Kept *kept) {
    const int cpu = atomic_load_explicit(&pool.cpu, memory_order_relaxed);
    if (cpu < 0 || sched_getaffinity(0, sizeof kept->before, &kept->before)) return 0;
    kept->now = kept->before;
    CPU_CLR(cpu, &kept->now);
    return CPU_COUNT(&kept->now) && !sched_setaffinity(0, sizeof kept->now, &kept->now);
}

static void run_anywhere(const Kept *kept) {
    cpu_set_t now;
    if (!sched_getaffinity(0, sizeof now, &now) && CPU_EQUAL(&now, &kept->now))
        sched_setaffinity(0, sizeof kept->before, &kept->before);
}
#else
typedef struct {
    int none;
} Kept;

static int keep_off_caller(Kept *kept) { return (void)kept, 0; }

static void run_anywhere(const Kept *kept) { (void)kept; }
#endif

INLINE void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Where a piece begins. In each of the rounds every thread has one piece; those of the second are half as long as those of
 * the first, and so on, and the last two rounds' are equal: long ones because memory is best read in order, short ones at the
 * end because nobody then waits long for the others. */
static long begin_of(const Region *region, long piece) {
    const long whole = 1 << (region->rounds - 1), round = piece / region->threads;
    const long before = round < region->rounds ? whole - (whole >> round) : whole;
    const long size = round < region->rounds - 1 ? whole >> (round + 1) : 1;
    const long shares = before * region->threads + piece % region->threads * size;
    return region->steps * shares / (whole * region->threads) * region->step;
}

static void do_piece(const Region *region, long piece, int slot) {
    const long from = begin_of(region, piece), to = begin_of(region, piece + 1);
    region->work(region->job, from, to < region->count ? to : region->count, slot);
}

/* Claims a piece and does it; 0 if there is none for this thread. */
static int help(int slot) {
    uint64_t claim = atomic_load(&pool.claim);
    do {
        if (NEXT(claim) >= NUM_PIECES(claim) || slot >= NUM_THREADS(claim)) return 0;
    } while (!atomic_compare_exchange_weak(&pool.claim, &claim, claim + (1 << 8)));
    do_piece(atomic_load(&pool.region), (long)NEXT(claim), slot);
    if (atomic_fetch_add(&pool.done, 1) + 1 == (int)NUM_PIECES(claim) && atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.finished);
        pthread_mutex_unlock(&pool.lock);
    }
    return 1;
}

static void sleep_until_called(int slot) {
    Kept kept;
    const int off = keep_off_caller(&kept);
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.asleep, 1);
    const uint64_t claim = atomic_load(&pool.claim);
    if (NEXT(claim) >= NUM_PIECES(claim) || slot >= NUM_THREADS(claim)) pthread_cond_wait(&pool.more, &pool.lock);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.lock);
    if (off) run_anywhere(&kept);
}

static void rest(long time) {
    Kept kept;
    const int off = keep_off_caller(&kept);
    nanosleep(&(struct timespec){time / 1000000, time % 1000000 * 1000}, 0);
    if (off) run_anywhere(&kept);
}

/* Helps until there was nothing to do for a while, or until this thread lost the CPU to others, or can't but hold the
 * caller's: then it returns 1. */
static int help_while_undisturbed(int slot, long *undisturbed) {
    const long began = microseconds(CLOCK_MONOTONIC);
    long last = began, idle = began, start = began, cpu = microseconds(CLOCK_THREAD_CPUTIME_ID);
    for (long i = 1;; i++) {
        const int helped = help(slot);
        if (!helped && i % 32) {
            pause_briefly();
            continue;
        }
        const long now = microseconds(CLOCK_MONOTONIC);
        *undisturbed = now - began;
        if (now - last > STOPPED || now - start > STOPPED) {
            const long used = microseconds(CLOCK_THREAD_CPUTIME_ID);
            if (now - start - (used - cpu) > STOPPED) return 1;
            start = now;
            cpu = used;
        }
        const int here = current_cpu();
        if (here >= 0 && here == atomic_load_explicit(&pool.cpu, memory_order_relaxed)) {
            Kept kept; /* moves the thread at once */
            if (!keep_off_caller(&kept)) return 1;
            run_anywhere(&kept);
        }
        last = now;
        if (helped) idle = now;
        if (now - idle > AWAKE) return 0;
    }
}

static void *worker(void *slot) {
    long next_rest = SHORTEST_REST, undisturbed = 0, total = 0;
    for (;;) {
        sleep_until_called((int)(long)slot);
        const int disturbed = help_while_undisturbed((int)(long)slot, &undisturbed);
        total += undisturbed;
        if (!disturbed) continue;
        if (total > UNDISTURBED) next_rest = SHORTEST_REST;
        total = 0;
        rest(next_rest);
        next_rest = 2 * next_rest < LONGEST_REST ? 2 * next_rest : LONGEST_REST;
    }
    return 0;
}

/* Only the thread that forked is left in the child: it has to start others. */
static void forget_workers(void) {
    pool.num_workers = 0;
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.taken, 0);
    atomic_store(&pool.waiting, 0);
    atomic_store(&pool.claim, 0);
    pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.more, 0);
    pthread_cond_init(&pool.finished, 0);
}

/* Starts threads until there are `num`, or as many as the system gives */
static void start_workers(int num) {
    static int prepared;
    if (!prepared) prepared = !pthread_atfork(0, 0, forget_workers);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for the program's own threads */
    while (pool.num_workers < num) {
        pthread_t thread;
        if (pthread_create(&thread, 0, worker, (void *)(long)(pool.num_workers + 1))) break;
        pthread_detach(thread);
        pool.num_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* Until every piece is done: awake for as long as the region took so far, then asleep, so that a thread that was stopped
 * inside of a piece can have this one's CPU */
static void wait_for(int pieces, long began) {
    if (atomic_load(&pool.done) == pieces) return;
    const long now = microseconds(CLOCK_MONOTONIC), limit = 2 * now - began + 20;
    for (long i = 1; i % 32 || microseconds(CLOCK_MONOTONIC) < limit; i++) {
        if (atomic_load(&pool.done) == pieces) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waiting, 1);
    while (atomic_load(&pool.done) < pieces) pthread_cond_wait(&pool.finished, &pool.lock);
    atomic_store(&pool.waiting, 0);
    pthread_mutex_unlock(&pool.lock);
}

void in_parallel(Work *work, void *job, long count, long step, int threads) {
    const long steps = (count + step - 1) / step;
    if (threads > MOST) threads = MOST;
    if (threads > steps) threads = (int)steps;
    if (threads <= 1 || atomic_exchange(&pool.taken, 1)) {
        if (count) work(job, 0, count, 0);
        return;
    }
    if (pool.num_workers < threads - 1) start_workers(threads - 1);
    static uint64_t number;
    int rounds = 1;
    while (rounds < ROUNDS && steps >= threads << rounds) rounds++;
    const int pieces = rounds * threads;
    Region region = {work, job, count, step, steps, threads, rounds};
    const long began = microseconds(CLOCK_MONOTONIC);
    atomic_store_explicit(&pool.region, &region, memory_order_relaxed);
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.cpu, current_cpu(), memory_order_relaxed);
    atomic_store(&pool.claim, CLAIM(++number, pieces, threads));
    if (atomic_load(&pool.asleep)) pthread_cond_broadcast(&pool.more);
    while (help(0)) {}
    wait_for(pieces, began);
    atomic_store(&pool.taken, 0);
}
