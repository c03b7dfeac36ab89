// What the parts of gpu_bench share: failing, measurements as JSON lines, device memory, and pages with an arena that knows them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "copy_path.hpp"
#include "host_registration.hpp"
#include "lmcn/paged_copy.hpp"
#include "memory/slot_image.hpp"

namespace lmcn::gpu_bench {

constexpr int kDevice = 0;

/// Prints what failed and ends the program with 1 unless all is well.
void check(cudaError_t error, const char* what);
void check(const Status& status, const std::string& what);
#define CHECK_CUDA(call) ::lmcn::gpu_bench::check((call), #call)

struct Options {
  bool small = false;  // on the fake runtime: shows that the program runs
  int rounds = 7;      // of which the median counts
  std::string folder;  // on the drive to be measured; empty: none is
};

/// One JSON object a line. Strings are ours: nothing in them needs escaping but quotes and backslashes.
class Lines {
 public:
  explicit Lines(std::FILE* file) : file_(file) {}
  using Field = std::pair<std::string, std::string>;
  static Field text(const std::string& name, const std::string& value);
  static Field number(const std::string& name, double value);
  static Field number(const std::string& name, std::int64_t value);
  static Field numbers(const std::string& name, const std::vector<double>& values);
  /// `kind` says which measurement it is.
  void write(const std::string& kind, const std::vector<Field>& fields);

 private:
  std::FILE* file_;
};

double median(std::vector<double> values);

/// Memory of the device.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) {
    void* memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, bytes));
    memory_ = static_cast<std::byte*>(memory);
  }
  ~DeviceMemory() { CHECK_CUDA(cudaFree(memory_)); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* get() const { return memory_; }

 private:
  std::byte* memory_ = nullptr;
};

class Stream {
 public:
  Stream() { CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { CHECK_CUDA(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  /// Seconds that what `enqueue` puts on the stream takes, from its beginning to its end, by events on it.
  double seconds(const std::function<void()>& enqueue) const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// `runs` pages of `run_bytes`, no two of them neighbours, and slots of an arena that hold them, page-locked as the copier does it.
/// A chunk has 16 blocks; there are 16 layers, or 1 for fewer runs.
class Rig {
 public:
  Rig(std::int64_t run_bytes, std::int64_t runs);
  ~Rig();
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  CopyJob job(std::uint64_t id, CopyDirection direction) const;
  std::int64_t bytes() const { return run_bytes * runs; }
  /// Overwrites the slots' payloads, so that a gather that did nothing shows.
  void clear_slots();
  /// Whether the slots hold what the pages were given first. Ends the program if not.
  void check_slots(const std::string& what) const;

  const std::int64_t run_bytes, runs, layers, blocks;  // blocks: of all chunks
  PagedKvLayout paged;
  SlotLayout slot;
  std::byte* arena = nullptr;
  std::uint64_t arena_bytes = 0, rank_bytes = 0;
  std::shared_ptr<HostRegistration> registration;
  std::vector<CopyItem> items;
  std::vector<std::int64_t> block_ids;
  /// Page `index` of layer `layer`, and where the slot holds it.
  std::byte* page(std::int64_t layer, std::int64_t index) const;
  std::byte* stored(std::int64_t layer, std::int64_t index) const;

 private:
  void fill();
  std::unique_ptr<DeviceMemory> memory_;
};

/// The parts; each writes its lines.
void measure_ceilings(const Options& options, Lines& lines);
void measure_paths(const Options& options, Lines& lines);
void measure_kernels(const Options& options, Lines& lines);
void measure_storage(const Options& options, Lines& lines);

/// Pages' sizes and how many, of all measurements by path: 16 to 16,384 runs as long as they are no more than 1 GiB.
std::vector<std::pair<std::int64_t, std::int64_t>> shapes(const Options& options);

}  // namespace lmcn::gpu_bench
