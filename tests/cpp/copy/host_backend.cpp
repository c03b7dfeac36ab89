#include <cstring>

#include "copier_suite.hpp"

namespace lmcn::copier_suite {
namespace {

class HostBackend final : public Backend {
 public:
  // Exactly as large as asked for: ASan sees the first byte past the end.
  std::byte* allocate(std::size_t bytes) override {
    memory_.emplace_back(new std::byte[bytes]);
    return memory_.back().get();
  }
  void release_all() override { memory_.clear(); }
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                            std::uint64_t arena_bytes, const CopierOptions& options) override {
    return make_host_copier(paged, slot, arena, arena_bytes, options);
  }

 private:
  std::vector<std::unique_ptr<std::byte[]>> memory_;
};

}  // namespace

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<HostBackend>();
}

}  // namespace lmcn::copier_suite
