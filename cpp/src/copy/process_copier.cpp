#include "copy/process_copier.hpp"

#include <string>
#include <utility>
#include <vector>

#include "base/fork_guard.hpp"

namespace lmcn {
namespace {

class ProcessCopier final : public PagedCopier {
 public:
  explicit ProcessCopier(std::unique_ptr<PagedCopier> copier) : copier_(std::move(copier)), name_(copier_->name()) {}
  ~ProcessCopier() override {
    if (inherited()) static_cast<void>(copier_.release());
  }

  Status submit(CopyJob job) override { return inherited() ? refusal() : copier_->submit(std::move(job)); }
  std::vector<CopyDone> poll() override { return inherited() ? std::vector<CopyDone>() : copier_->poll(); }
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) override {
    return inherited() ? refusal() : copier_->wait(ids, timeout);
  }
  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, std::uint64_t stream) override {
    return inherited() ? refusal() : copier_->wait_layers(id, layers, timeout, stream);
  }
  void cancel(std::span<const std::uint64_t> ids) override {
    if (!inherited()) copier_->cancel(ids);
  }
  Status lost() const override { return inherited() ? refusal() : copier_->lost(); }
  std::string name() const override { return inherited() ? name_ : copier_->name(); }
  std::string details() const override { return inherited() ? refusal().message() : copier_->details(); }

 private:
  bool inherited() const noexcept { return fork_guard::forks() != forks_; }
  static Status refusal() { return {Code::kUnavailable, "the copier belongs to the parent process, a forked child cannot use it"}; }

  std::unique_ptr<PagedCopier> copier_;
  const std::string name_;
  const std::uint64_t forks_ = fork_guard::forks();
};

}  // namespace

std::unique_ptr<PagedCopier> of_this_process(std::unique_ptr<PagedCopier> copier) {
  return std::make_unique<ProcessCopier>(std::move(copier));
}

}  // namespace lmcn
