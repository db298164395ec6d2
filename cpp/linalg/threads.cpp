#include "linalg/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifdef BITWRIGHT_SCIPY_OPENBLAS
extern "C" {
void scipy_openblas_set_num_threads(int threads);
char* scipy_openblas_get_config();
}
#endif

namespace bitwright {
namespace {

constexpr int spins_before_sleep = 4000;  // about 50 µs: longer than the gap between two kernels

int available_processors() {
#ifdef __linux__
    cpu_set_t allowed;  // honours taskset and containers, unlike hardware_concurrency
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

// Waits a moment, the longer it has been the more politely: where other processes want the
// processor, a spinning thread would keep it from the very thread that it waits for.
void relax(int spin, int spins) {
#if defined(__x86_64__)
    if (spin < spins) return __builtin_ia32_pause();
#endif
    (void)spin, (void)spins;
    std::this_thread::yield();
}

// Workers 1 .. size-1; the caller of run() is worker 0.
class Pool {
  public:
    // Of more threads than processors, one that spins keeps another from its work.
    explicit Pool(int size) : spins_(size > available_processors() ? 0 : spins_before_sleep) {
        for (int worker = 1; worker < size; ++worker)
            threads_.emplace_back([this, worker] { work(worker); });
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
            ++round_;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return static_cast<int>(threads_.size()) + 1; }
    bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
    void release() { busy_.store(false, std::memory_order_release); }

    // Between acquire() and release(): job(worker) for worker = 0 .. jobs-1, jobs <= size().
    void run(int jobs, const std::function<void(int)>& job) {
        job_ = &job;
        jobs_ = jobs;
        pending_.store(size() - 1, std::memory_order_relaxed);
        {
            std::lock_guard lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job(0);
        for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin)
            relax(std::min(spin, spins_), spins_);
    }

  private:
    void work(int worker) {
        unsigned seen = 0;
        for (;;) {
            for (int spin = 0; spin < spins_ && round_.load() == seen; ++spin) relax(spin, spins_);
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load() != seen; });
            }
            seen = round_.load(std::memory_order_acquire);
            if (stop_) return;
            if (worker < jobs_) (*job_)(worker);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int spins_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> round_{0};
    std::atomic<int> pending_{0};
    std::atomic<bool> busy_{false};
    const std::function<void(int)>* job_ = nullptr;
    int jobs_ = 0;
    bool stop_ = false;
};

// Behind pointers, since a child process may find them locked by a thread that it does not have.
std::mutex* settings_mutex = new std::mutex;
std::atomic<int> thread_count{0};
Pool* pool = nullptr;  // never destroyed at exit: its threads may be inside the operating system

// Threads do not survive fork(): the next call makes new ones.
void start_afresh_in_child() {
    pool = nullptr;
    settings_mutex = new std::mutex;
}

// The pool if nobody else is using it, made to the current size first; null while it is busy.
Pool* acquire_pool() {
    const int wanted = num_threads();
    std::lock_guard lock(*settings_mutex);
    if (pool && !pool->acquire()) return nullptr;
    if (pool && pool->size() != wanted) {
        delete pool;
        pool = nullptr;
    }
    if (!pool) {
        pool = new Pool(wanted);
        pool->acquire();
    }
    return pool;
}

}  // namespace

int num_threads() {
    static std::once_flag once;
    std::call_once(once, [] {
        pthread_atfork(nullptr, nullptr, start_afresh_in_child);
        thread_count = std::clamp(available_processors(), 1, 64);
#ifdef BITWRIGHT_SCIPY_OPENBLAS
        scipy_openblas_set_num_threads(1);  // products are shared out in linalg/product.hpp
#endif
    });
    return thread_count;
}

void set_num_threads(int threads) {
    num_threads();
    std::lock_guard lock(*settings_mutex);
    thread_count = threads;
}

void parallel_for(Index count, Index grain, const std::function<void(Index, Index)>& body) {
    Pool* mine = count > grain && num_threads() > 1 ? acquire_pool() : nullptr;
    if (!mine) {
        for (Index begin = 0; begin < count; begin += grain)
            body(begin, std::min(begin + grain, count));
        return;
    }
    std::atomic<Index> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    mine->run(mine->size(), [&](int) {
        try {
            for (Index begin; (begin = next.fetch_add(grain)) < count;)
                body(begin, std::min(begin + grain, count));
        } catch (...) {
            std::lock_guard lock(failure_mutex);
            failure = std::current_exception();
        }
    });
    mine->release();
    if (failure) std::rethrow_exception(failure);
}

const char* blas_name() {
#ifdef BITWRIGHT_SCIPY_OPENBLAS
    return scipy_openblas_get_config();
#else
    return "system";
#endif
}

}  // namespace bitwright
