// The parked thread pool: std::thread and condition variables, no OpenMP.
//
// [Note: Pool] Work is a ticket with a number of items. Released tickets wait in the pool's queue, highest
// priority first, then oldest first. A worker takes the first ticket and draws its items from an atomic
// counter without a lock; between items it looks at one atomic whether a higher priority waits. Whoever
// finishes the last item sums up and marks the ticket done. A ticket leaves the queue when its items are all
// drawn. Idle workers block in the kernel: a spinning worker would take the core of the launching thread.
//
// [Note: Fork] Threads do not survive fork. Before it, every pool's mutex is taken, so that the child sees a
// whole queue; in the child the mutexes and condition variables are made anew, unfinished tickets end with
// LSS_ERR_FORKED (their memory is a copy, and half of an update may be in it), and threads start again with
// the next submission.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "error.h"

struct lss_pool {
    std::mutex mutex;
    std::condition_variable work_arrived;
    std::condition_variable work_done;
    std::vector<lss_ticket *> queue;       // released, with items left to draw; sorted
    std::vector<lss_ticket *> unfinished;  // every ticket of this pool that is not done, held ones too
    std::atomic<int32_t> top_priority{INT32_MIN};
    std::vector<std::thread> threads;
    std::vector<int32_t> cpus;
    int32_t num_threads = 1;
    uint64_t next_order = 0;
    bool stopping = false;
};

namespace {

std::mutex registry_mutex;
std::vector<lss_pool *> &registry() {
    static auto *pools = new std::vector<lss_pool *>;  // never destroyed: workers may outlive static destructors
    return *pools;
}

void drop(lss_ticket *ticket) {
    if (ticket->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete ticket;
}

template <class T>
void remove_one(std::vector<T> &from, const T &value) {
    const auto it = std::find(from.begin(), from.end(), value);
    if (it != from.end()) from.erase(it);
}

// Mutex held.
void update_top(lss_pool *pool) {
    pool->top_priority.store(pool->queue.empty() ? INT32_MIN : pool->queue.front()->priority,
                             std::memory_order_relaxed);
}

// Mutex held. Drops the pool's reference.
void mark_done(lss_pool *pool, lss_ticket *ticket) {
    remove_one(pool->unfinished, ticket);
    ticket->done.store(true, std::memory_order_release);
    pool->work_done.notify_all();
    drop(ticket);
}

// Mutex held.
void enqueue(lss_pool *pool, lss_ticket *ticket) {
    ticket->held = false;
    if (ticket->num_items == 0) {
        ticket->finish();
        mark_done(pool, ticket);
        return;
    }
    const auto before = [](const lss_ticket *a, const lss_ticket *b) {
        return a->priority != b->priority ? a->priority > b->priority : a->order < b->order;
    };
    pool->queue.insert(std::upper_bound(pool->queue.begin(), pool->queue.end(), ticket, before), ticket);
    update_top(pool);
    if (ticket->num_items == 1) {
        pool->work_arrived.notify_one();
    } else {
        pool->work_arrived.notify_all();
    }
}

void set_up_thread(const lss_pool *pool) {
#if defined(__x86_64__)
    // A thread inherits its creator's rounding and flush-to-zero modes; results must not depend on them.
    _mm_setcsr(0x1f80);
#endif
    if (pool->cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int32_t cpu : pool->cpus) CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // checked in lss_pool_create
}

void work(lss_pool *pool) {
    set_up_thread(pool);
    std::unique_lock<std::mutex> lock(pool->mutex);
    for (;;) {
        pool->work_arrived.wait(lock, [&] { return pool->stopping || !pool->queue.empty(); });
        if (pool->queue.empty()) return;  // stopping, and everything released has been drawn
        lss_ticket *ticket = pool->queue.front();
        ticket->references.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        const bool finished = ticket->take_items(&pool->top_priority);
        lock.lock();
        if (ticket->next_item.load(std::memory_order_relaxed) >= ticket->num_items) {
            remove_one(pool->queue, ticket);
            update_top(pool);
        }
        if (finished) mark_done(pool, ticket);
        drop(ticket);
    }
}

void before_fork() {
    registry_mutex.lock();
    for (lss_pool *pool : registry()) pool->mutex.lock();
}

void after_fork_parent() {
    for (lss_pool *pool : registry()) pool->mutex.unlock();
    registry_mutex.unlock();
}

void after_fork_child() {
    for (lss_pool *pool : registry()) {
        new (&pool->mutex) std::mutex;
        new (&pool->work_arrived) std::condition_variable;
        new (&pool->work_done) std::condition_variable;
        new (&pool->threads) std::vector<std::thread>;  // leaks the handles: their threads do not exist here
        pool->queue.clear();
        update_top(pool);
        for (lss_ticket *ticket : std::vector<lss_ticket *>(pool->unfinished)) {
            ticket->held = false;
            ticket->status.store(LSS_ERR_FORKED);
            mark_done(pool, ticket);
        }
    }
    new (&registry_mutex) std::mutex;
}

// Mutex held.
int32_t start_threads(lss_pool *pool) {
    if (!pool->threads.empty()) return LSS_OK;
    try {
        pool->threads.reserve(static_cast<size_t>(pool->num_threads));
        for (int32_t i = 0; i < pool->num_threads; ++i) pool->threads.emplace_back(work, pool);
    } catch (...) {
        // The threads that did start are enough.
        if (pool->threads.empty()) return lss::fail(LSS_ERR_THREAD, "the system refused to start a pool thread");
    }
    return LSS_OK;
}

int32_t default_num_threads() {
    const char *text = std::getenv("LSS_CPU_THREADS");
    if (text && *text) {
        char *end = nullptr;
        const long asked = std::strtol(text, &end, 10);
        if (*end || asked < 1 || asked > 4096) {
            return lss::fail(LSS_ERR_ARGUMENT, "LSS_CPU_THREADS must be a number from 1 to 4096, found '%s'", text);
        }
        return static_cast<int32_t>(asked);
    }
    cpu_set_t set;
    const int available = sched_getaffinity(0, sizeof set, &set) == 0
                              ? CPU_COUNT(&set)
                              : static_cast<int>(std::thread::hardware_concurrency());
    return std::max(1, available - 1);  // one core stays with the thread that launches GPU work
}

int32_t check_cpus(const int32_t *cpus, int32_t num_cpus) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return LSS_OK;
    for (int32_t i = 0; i < num_cpus; ++i) {
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE || !CPU_ISSET(cpus[i], &allowed)) {
            return lss::fail(LSS_ERR_ARGUMENT, "CPU %d is not among those this process may run on", cpus[i]);
        }
    }
    return LSS_OK;
}

}  // namespace

bool lss_ticket::take_items(const std::atomic<int32_t> *yield) {
    bool finished = false;
    for (;;) {
        const int64_t item = next_item.fetch_add(1, std::memory_order_relaxed);
        if (item >= num_items) break;
        run(item);
        // acq_rel: whoever sums up sees what every other thread wrote.
        if (finished_items.fetch_add(1, std::memory_order_acq_rel) + 1 == num_items) {
            finish();
            finished = true;
            break;
        }
        if (yield && yield->load(std::memory_order_relaxed) > priority) break;
    }
    return finished;
}

void lss_ticket::run_inline() {
#if defined(__x86_64__)
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(0x1f80);
#endif
    for (int64_t item = 0; item < num_items; ++item) run(item);
    finish();
#if defined(__x86_64__)
    _mm_setcsr(saved);
#endif
    done.store(true, std::memory_order_release);
}

int32_t lss::submit(lss_pool *pool, std::unique_ptr<lss_ticket> owned, const lss_submit *how, lss_ticket **ticket) {
    lss_ticket *const task = owned.release();
    if (how) task->priority = how->priority;
    const bool held = how && how->held;
    if (!pool) {
        if (held) {
            drop(task);
            return fail(LSS_ERR_ARGUMENT, "held work needs a pool");
        }
        task->run_inline();
    } else {
        std::lock_guard<std::mutex> lock(pool->mutex);
        const int32_t status = start_threads(pool);
        if (status != LSS_OK) {
            drop(task);
            return status;
        }
        task->pool = pool;
        task->order = pool->next_order++;
        task->references.fetch_add(1, std::memory_order_relaxed);  // the pool's
        pool->unfinished.push_back(task);
        if (held) {
            task->held = true;
        } else {
            enqueue(pool, task);
        }
    }
    if (ticket) {
        *ticket = task;
        return LSS_OK;
    }
    const int32_t status = lss_ticket_wait(task);
    drop(task);
    return status;
}

extern "C" {

int32_t lss_pool_create(int32_t num_threads, const int32_t *cpus, int32_t num_cpus, lss_pool **pool) {
    static const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
    if (registered != 0) return lss::fail(LSS_ERR_MEMORY, "pthread_atfork failed");
    if (num_threads > 4096) return lss::fail(LSS_ERR_ARGUMENT, "num_threads must be at most 4096, found %d", num_threads);
    int32_t status = check_cpus(cpus, num_cpus);
    if (status != LSS_OK) return status;
    if (num_threads < 1) num_threads = default_num_threads();
    if (num_threads < 1) return num_threads;
    auto *made = new (std::nothrow) lss_pool;
    if (!made) return lss::fail(LSS_ERR_MEMORY, "no memory for a pool");
    made->num_threads = num_threads;
    made->cpus.assign(cpus, cpus + num_cpus);
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry().push_back(made);
    *pool = made;
    return LSS_OK;
}

int32_t lss_pool_num_threads(const lss_pool *pool) { return pool->num_threads; }

int32_t lss_pool_drain(lss_pool *pool) {
    std::unique_lock<std::mutex> lock(pool->mutex);
    const uint64_t end = pool->next_order;  // later work may follow without end
    pool->work_done.wait(lock, [&] {
        return std::none_of(pool->unfinished.begin(), pool->unfinished.end(),
                            [&](const lss_ticket *ticket) { return !ticket->held && ticket->order < end; });
    });
    return LSS_OK;
}

int32_t lss_pool_destroy(lss_pool *pool) {
    {
        std::lock_guard<std::mutex> lock(registry_mutex);
        remove_one(registry(), pool);
    }
    {
        std::lock_guard<std::mutex> lock(pool->mutex);
        pool->stopping = true;
        for (lss_ticket *ticket : std::vector<lss_ticket *>(pool->unfinished)) {
            if (!ticket->held) continue;
            ticket->held = false;
            ticket->status.store(LSS_ERR_CANCELLED);
            mark_done(pool, ticket);
        }
        pool->work_arrived.notify_all();
    }
    for (std::thread &thread : pool->threads) thread.join();
    delete pool;
    return LSS_OK;
}

int32_t lss_ticket_create(lss_pool *pool, lss_ticket **ticket) {
    const lss_submit how = {0, 1};
    return lss::submit(pool, std::make_unique<lss_ticket>(), &how, ticket);
}

int32_t lss_ticket_release(lss_ticket *ticket) {
    // A done ticket's pool may be gone; a held one's is not, because destroying the pool cancels it.
    if (ticket->done.load(std::memory_order_acquire)) return LSS_OK;
    std::lock_guard<std::mutex> lock(ticket->pool->mutex);
    if (ticket->held) enqueue(ticket->pool, ticket);
    return LSS_OK;
}

int32_t lss_ticket_cancel(lss_ticket *ticket) {
    if (ticket->done.load(std::memory_order_acquire)) return LSS_OK;
    std::lock_guard<std::mutex> lock(ticket->pool->mutex);
    if (!ticket->held) return LSS_OK;
    ticket->held = false;
    ticket->status.store(LSS_ERR_CANCELLED);
    mark_done(ticket->pool, ticket);
    return LSS_OK;
}

int32_t lss_ticket_done(const lss_ticket *ticket) { return ticket->done.load(std::memory_order_acquire) ? 1 : 0; }

int32_t lss_ticket_wait(lss_ticket *ticket) {
    if (!ticket->done.load(std::memory_order_acquire)) {
        std::unique_lock<std::mutex> lock(ticket->pool->mutex);
        ticket->pool->work_done.wait(lock, [&] { return ticket->done.load(std::memory_order_acquire); });
    }
    const int32_t status = ticket->status.load();
    if (status == LSS_ERR_FORKED) return lss::fail(status, "the work was pending when the process forked");
    if (status == LSS_ERR_CANCELLED) return lss::fail(status, "the held work was cancelled before its release");
    return status;
}

void lss_ticket_free(lss_ticket *ticket) { drop(ticket); }

void lss_ticket_ref(lss_ticket *ticket) { ticket->references.fetch_add(1, std::memory_order_relaxed); }

void lss_notify(void *ticket) {
    auto *const released = static_cast<lss_ticket *>(ticket);
    lss_ticket_release(released);
    drop(released);
}

}  // extern "C"
