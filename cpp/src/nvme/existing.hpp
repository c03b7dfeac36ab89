// A store's directory, locked and read, that no store owns. For lmcn/inspect.hpp.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "io/io_engine.hpp"
#include "lmcn/inspect.hpp"
#include "nvme/log.hpp"

namespace lmcn::nvme {

class ExistingStore {
 public:
  static Result<ExistingStore> open(const std::string& directory);

  /// Those that a lookup could find, by region sequence and page.
  const std::vector<RecoveredRecord>& records() const noexcept { return records_; }
  Log& log() noexcept { return *log_; }
  StoreReport report() const;
  /// Of each of records(); none where the header page does not hold.
  Status read_namespaces(std::vector<std::optional<NamespaceId>>& namespaces);

  // --- erase.cpp
  Result<ClearReport> clear_all();
  Result<ClearReport> erase(const ClearSelection& selection);

 private:
  struct NoClient final : LogClient {
    bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return true; }
    void on_reclaim(std::uint32_t, std::span<const std::uint32_t>) override {}
  };
  Status write_now(io::Op op, std::byte* data, std::uint64_t bytes, std::uint64_t offset, const char* what);

  std::string engine_note_;
  std::unique_ptr<io::IoEngine> engine_;
  std::unique_ptr<NoClient> client_;
  std::unique_ptr<Log> log_;
  std::vector<RecoveredRecord> records_;
  std::vector<RecoveredRecord> superseded_;  // written again later
};

}  // namespace lmcn::nvme
