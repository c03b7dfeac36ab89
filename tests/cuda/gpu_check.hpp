// What the parts of gpu_check share: failing, and memory of a device as the copier suite wants it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "copier_suite.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn::gpu_check {

constexpr int kDevice = 0;

/// Prints what failed and ends the program with 1 unless `error` says that all is well.
void check(cudaError_t error, const char* what);
void check(const std::string& error, const std::string& what);
void check(const Status& status, const std::string& what);
#define CHECK_CUDA(call) ::lmcn::gpu_check::check((call), #call)

/// Memory of kDevice, an arena that is registered with CUDA before a copier sees it or only by the copier, and the CUDA copier.
class GpuBackend final : public copier_suite::Backend {
 public:
  explicit GpuBackend(bool registered) : registered_(registered) {}
  ~GpuBackend() override { release_all(); }
  const char* host_memory() const { return registered_ ? "registered" : "new"; }

  std::byte* allocate(std::size_t bytes) override;
  void release_all() override;
  std::byte* allocate_arena(std::size_t bytes) override;
  void release_arena(std::byte* arena) override;
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override;
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override;
  void synchronize() override;
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                            std::uint64_t arena_bytes, const CopierOptions& options) override;

 private:
  const bool registered_;
  std::vector<void*> memory_;
};

/// Engine streams and copies that must wait for each other, in both directions and layer by layer.
void check_order(GpuBackend& backend, int rounds);
/// Slots that are given away and filled again while other jobs run, are cancelled, or come too late.
void check_reuse(GpuBackend& backend, int rounds);
/// Checksums taken on the device, of whole and of damaged slot images, beside the host's.
void check_verify(GpuBackend& backend, int rounds);

}  // namespace lmcn::gpu_check
