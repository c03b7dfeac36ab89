// An IoEngine that is a device with a volatile cache, for one thread and deterministic: requests wait until step() ends one of
// them, in any order; what no completed fdatasync covers may be lost, page by page, when the power goes.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "chunks.hpp"
#include "io/io_engine.hpp"

namespace lmcn::crash {

/// The log's files are real files below `directory` (put it on a tmpfs), so that the log can stat, allocate and rename them; their
/// durable content is kept here. The data file is the one that the log registers; all others are small files that are replaced by
/// rename.
class SimulatedDevice final : public io::IoEngine {
 public:
  enum class Mode {
    kQueue,  // every request waits for step()
    kCall,   // the log waits inside a call: requests of this thread end at once, those submitted by completions wait
    kAllAtOnce,
  };

  SimulatedDevice(std::filesystem::path directory, Random& random) : directory_(std::move(directory)), random_(random) {}
  /// REQUIRES: idle().
  ~SimulatedDevice() override = default;

  void set_mode(Mode mode) noexcept { mode_ = mode; }
  bool idle() const noexcept { return queue_.empty(); }
  /// Ends one request; false: none waits.
  bool step();
  void drain() {
    while (step()) {
    }
  }

  /// All that the files hold now is durable: after open(), and after a call of the log that replaced a small file returned.
  void settle_data();
  void settle_small_files();

  /// The directory as it may look after the power went just now, made at `to`: each write that is not durable is there, absent or
  /// torn within, page by page; the file's end and each small file are old or new.
  void cut_power(const std::filesystem::path& to, Random& random) const;

  /// Called before each request is queued and after each is done: the moments at which the power may go.
  std::function<void()> on_event;
  /// fdatasync of the data file: what was true when it began is durable when it has ended.
  std::function<std::uint64_t()> on_sync_begins;
  std::function<void(std::uint64_t)> on_sync_ended;

  void submit(std::span<const io::IoRequest> requests) override;
  Status register_buffer(std::span<std::byte>) override { return {}; }
  Status register_fd(int fd) override;
  void unregister_fd(int) override { data_fd_ = -1; }
  std::string name() const override { return "simulated"; }

 private:
  using Bytes = std::vector<std::byte>;
  struct Write {
    std::uint64_t offset;
    Bytes bytes;
    bool done = false;
  };
  struct Waiting {
    io::IoRequest request;
    std::uint64_t write = 0;              // of the data file: its number
    std::vector<std::uint64_t> covers{};  // of an fdatasync of the data file: writes that were done when it began
    std::uint64_t file_bytes = 0;         // and the file's length then
    std::uint64_t token = 0;
  };

  void perform(Waiting waiting);
  void end_sync(const Waiting& waiting);
  void apply(const Write& write);
  std::uint64_t data_file_bytes() const;
  void note_small_file_synced(int fd);

  const std::filesystem::path directory_;
  Random& random_;
  Mode mode_ = Mode::kQueue;
  int depth_ = 0;  // completions under way
  int data_fd_ = -1;
  std::deque<Waiting> queue_;
  Bytes durable_;                           // the data file as far as an fdatasync covered it
  std::map<std::uint64_t, Write> pending_;  // by number, which is the order of submission
  std::uint64_t next_write_ = 1;
  /// What each small file may be after a power cut; nullopt: absent. Never empty once the file was seen.
  std::map<std::string, std::vector<std::optional<Bytes>>> small_files_;
  mutable Bytes image_;  // kept, because fresh memory for each image costs more than all else
};

}  // namespace lmcn::crash
