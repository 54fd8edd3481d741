#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

namespace paroattn {
namespace {

constexpr int64_t kPatience = 10000;  // looks for a task before a thread gives its CPU away: milliseconds
constexpr int64_t kChunk = 256;  // tokens per task of statistics; fixed, so that sums never depend on the threads

Kernel kernel_for(Capability capability, const Head& head) {
  switch (capability) {
#ifdef PAROATTN_X86
    case Capability::kAvx512Bf16:
      return avx512_bf16_kernel(head.qk, head.pv, head.head_dim);
    case Capability::kAvx512Vnni:
      return avx512_vnni_kernel(head.qk, head.pv, head.head_dim);
    case Capability::kAvx2:
      return avx2_kernel(head.qk, head.pv, head.head_dim);
#endif
    default:
      return baseline_kernel(head.qk, head.pv, head.head_dim);
  }
}

// Memory for the packed heads, handed out in pieces that start on cache lines.
class Workspace {
 public:
  // Every part is asked for twice in the same order: first to learn the size, then, after `allocate`, to get memory.
  template <class T>
  void take(T*& piece, size_t count) {
    piece = memory_ ? reinterpret_cast<T*>(memory_.get() + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
  }

  void allocate() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, used_)));
    if (!memory_) throw std::bad_alloc();
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t used_ = 0;
};

void take_buffers(Head& head, const Kernel& kernel, Workspace& workspace) {
  const size_t token_blocks = block_count(head.tokens), mean_blocks = mean_block_count(head);
  const size_t blocks = token_blocks + mean_blocks;
  workspace.take(head.packed_key, blocks * kernel.key_bytes);
  workspace.take(head.packed_value, blocks * kernel.value_bytes);
  workspace.take(head.score_start, blocks * kBlock);
  workspace.take(head.key_scale, blocks);
  workspace.take(head.shown, blocks);
  workspace.take(head.token_sums, head.compensate ? token_blocks * 2 * head.head_dim : 0);
  workspace.take(head.mean_value_scale, mean_blocks);
  workspace.take(head.mean_log_share, mean_blocks * kBlock);
}

// Means and channel scales from the moments of all chunks, added in the order of the tokens.
void combine(Head& head, const Moments* chunks, int64_t count) {
  for (int d = 0; d < kMaxHeadDim; ++d) {
    head.key_mean[d] = head.value_mean[d] = 0;
    head.value_scale[d] = 1;
    if (d >= head.head_dim) continue;
    double key = 0, value = 0;
    float smallest = chunks[0].value_min[d], largest = chunks[0].value_max[d];
    for (int64_t i = 0; i < count; ++i) {
      key += chunks[i].key_sum[d];
      value += chunks[i].value_sum[d];
      smallest = std::min(smallest, chunks[i].value_min[d]);
      largest = std::max(largest, chunks[i].value_max[d]);
    }
    if (is_integer(head.qk)) head.key_mean[d] = float(key / head.tokens);
    if (!is_integer(head.pv)) continue;
    const float mean = head.value_mean[d] = float(value / head.tokens);
    const float scale = std::max(largest - mean, mean - smallest) / symmetric_steps(head.pv);
    head.value_scale[d] = std::isnan(mean) ? mean : std::max(scale, 1.17549435e-38f);
  }
}

// What is done for a head, in this order. Each stage begins when the one before it is done.
enum Stage { kMeasure, kCombine, kPack, kPackMeans, kAttend, kStages };

// The tasks of a stage of a head. Whichever thread has time takes the next one.
class alignas(64) Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  // A task that no thread has taken yet, or -1.
  int64_t take() {
    if (taken_.load(std::memory_order_relaxed) >= count_) return -1;
    const int64_t task = taken_.fetch_add(1, std::memory_order_relaxed);
    return task < count_ ? task : -1;
  }

  // True for the last one.
  bool finish() { return finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_; }

  // Once true, all that the tasks wrote can be read.
  bool are_done() const { return finished_.load(std::memory_order_acquire) >= count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> taken_{0}, finished_{0};
};

// Where a thread finds its next task. No thread waits for a task that another one has taken while there are others: the
// system may have taken that thread from its CPU for as long as all of attention takes.
class Schedule {
 public:
  Schedule(const std::vector<Head>& heads, int64_t chunks) {
    for (const Head& head : heads) {
      const int64_t blocks = block_count(head.tokens);
      for (const int64_t count : {chunks, int64_t(1), blocks, mean_block_count(head), blocks}) {
        tasks_.emplace_back(std::make_unique<Tasks>(count));
      }
    }
  }

  Tasks& of(int64_t head, int stage) { return *tasks_[head * kStages + stage]; }

  // How far a thread has come: heads before these are packed, or have no rows left.
  struct Place {
    int64_t packing = 0, attending = 0;
  };

  struct Task {
    int64_t head;
    int stage;
    int64_t number;
  };

  // A task that can be done now, of the first head that has one; false if all others are taken. Heads are packed first,
  // so that the last tasks, for which threads do wait, are short.
  bool take(Place& place, Task& task) {
    const int64_t heads = int64_t(tasks_.size()) / kStages;
    for (int64_t round = 0;; ++round) {
      while (place.packing < heads && is_packed(place.packing)) ++place.packing;
      for (int64_t head = place.packing; head < heads; ++head) {
        int stage = kMeasure;
        while (stage < kAttend && of(head, stage).are_done()) ++stage;
        if (stage < kAttend && take(head, stage, task)) return true;
      }
      for (int64_t head = place.attending; head < heads; ++head) {
        if (!is_packed(head)) continue;
        if (take(head, kAttend, task)) return true;
        if (head == place.attending) ++place.attending;
      }
      if (place.attending == heads) return false;
      // Tasks are short. To yield to another process is to wait for its turn to end.
      if (round > kPatience) std::this_thread::yield();
    }
  }

  bool is_packed(int64_t head) { return of(head, kPack).are_done() && of(head, kPackMeans).are_done(); }

 private:
  bool take(int64_t head, int stage, Task& task) {
    task = {head, stage, of(head, stage).take()};
    return task.number >= 0;
  }

  std::vector<std::unique_ptr<Tasks>> tasks_;
};

}  // namespace

Capability best_capability() {
#ifdef PAROATTN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  if (avx512) return Capability::kAvx512Vnni;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

Report run(std::vector<Head>& heads, Capability capability, int threads) {
  if (heads.empty()) return {};  // no batch elements
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto packed = start;
  std::vector<Kernel> kernels;
  for (const Head& head : heads) kernels.push_back(kernel_for(capability, head));
  Workspace workspace;
  for (size_t h = 0; h < heads.size(); ++h) take_buffers(heads[h], kernels[h], workspace);
  workspace.allocate();
  for (size_t h = 0; h < heads.size(); ++h) take_buffers(heads[h], kernels[h], workspace);

  const int64_t tokens = heads[0].tokens, chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<Moments> moments(heads.size() * chunks);
  Schedule schedule(heads, chunks);
  std::atomic<size_t> packed_heads{0};
  int64_t visited = 0;
#pragma omp parallel num_threads(threads) reduction(+ : visited)
  {
    Schedule::Place place;
    Schedule::Task task;
    while (schedule.take(place, task)) {
      const int64_t number = task.number;
      Head& head = heads[task.head];
      const Kernel& kernel = kernels[task.head];
      Moments* const of_chunks = &moments[task.head * chunks];
      switch (task.stage) {
        case kMeasure:
          kernel.measure(head, number * kChunk, std::min((number + 1) * kChunk, tokens), of_chunks[number]);
          break;
        case kCombine:
          combine(head, of_chunks, chunks);
          break;
        case kPack:
          kernel.pack(head, number);
          break;
        case kPackMeans:
          kernel.pack_means(head, number);
          break;
        default:
          visited += kernel.attend(head, number);
      }
      const int last_before_attending = mean_block_count(head) ? kPackMeans : kPack;
      if (schedule.of(task.head, task.stage).finish() && task.stage == last_before_attending &&
          ++packed_heads == heads.size()) {
        packed = Clock::now();
      }
    }
  }
  return {visited, std::chrono::duration<double>(packed - start).count()};
}

}  // namespace paroattn
