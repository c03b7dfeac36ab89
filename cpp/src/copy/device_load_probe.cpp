// probe_gds(): a scratch file in the store's directory, written and read both ways by as many threads as records are read at once.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "copy/device_load_files.hpp"
#include "copy/device_load_stage.hpp"
#include "lmcn/device_load.hpp"
#include "memory/checksum.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kPieceBytes = 2 << 20;
constexpr std::uint32_t kSegmentBytes = kMinSegmentBytes;
constexpr std::uint64_t kSegments = kPieceBytes / kSegmentBytes;  // of a piece

/// Random bytes that differ from piece to piece.
class Pattern {
 public:
  explicit Pattern(std::uint64_t pieces) : base_(kPieceBytes / sizeof(std::uint64_t)), checksums_(pieces * kSegments) {
    std::mt19937_64 random{std::random_device{}()};
    for (std::uint64_t& word : base_) word = random();
    std::vector<std::byte> piece(kPieceBytes);
    for (std::uint64_t i = 0; i < pieces; ++i) {
      fill(i, piece.data());
      for (std::uint64_t s = 0; s < kSegments; ++s) {
        checksums_[i * kSegments + s] = checksum64(piece.data() + s * kSegmentBytes, kSegmentBytes);
      }
    }
  }
  void fill(std::uint64_t piece, std::byte* to) const {
    std::memcpy(to, base_.data(), kPieceBytes);
    for (std::uint64_t s = 0; s < kSegments; ++s) {
      const std::uint64_t number = piece * kSegments + s;
      std::memcpy(to + s * kSegmentBytes, &number, sizeof number);
    }
  }
  StagedSegments segments(std::uint64_t piece) const {
    return {kPieceBytes, kSegmentBytes, static_cast<std::uint32_t>(piece * kSegments),
            std::span(checksums_).subspan(piece * kSegments, kSegments)};
  }

 private:
  std::vector<std::uint64_t> base_;
  std::vector<std::uint64_t> checksums_;
};

class Prober {
 public:
  Prober(DeviceStage& stage, unsigned threads, std::uint64_t pieces)
      : stage_(stage), threads_(threads), pieces_(pieces), pattern_(pieces) {}

  // Each: 10^9 bytes per second, or the first error.
  Result<double> host_write(const LoadFile& file) {
    return pass(
        file, [&](DeviceStageLane& lane, std::uint64_t piece) { return put(lane, piece); },
        [&](DeviceStageLane& lane, std::uint64_t piece) {
          LMCN_RETURN_IF_ERROR(lane.download(kPieceBytes));
          return file.write(piece * kPieceBytes, lane.host_memory().value(), kPieceBytes);
        });
  }
  Result<double> gds_write(const LoadFile& file) {
    return pass(
        file, [&](DeviceStageLane& lane, std::uint64_t piece) { return put(lane, piece); },
        [&](DeviceStageLane& lane, std::uint64_t piece) {
          return judged(file.gds_write(piece * kPieceBytes, lane.memory(), kPieceBytes));
        });
  }
  Result<double> host_read(const LoadFile& file, bool verify) {
    return pass(file, nothing, [&, verify](DeviceStageLane& lane, std::uint64_t piece) {
      LMCN_RETURN_IF_ERROR(file.read(piece * kPieceBytes, lane.host_memory().value(), kPieceBytes));
      LMCN_RETURN_IF_ERROR(lane.upload(kPieceBytes));
      return verify ? lane.verify(pattern_.segments(piece)) : Status();
    });
  }
  Result<double> gds_read(const LoadFile& file, bool verify) {
    return pass(file, nothing, [&, verify](DeviceStageLane& lane, std::uint64_t piece) {
      LMCN_RETURN_IF_ERROR(judged(file.gds_read(piece * kPieceBytes, lane.memory(), kPieceBytes)));
      return verify ? lane.verify(pattern_.segments(piece)) : Status();
    });
  }

  /// The device may still use the staging memory: for no pass any more.
  bool lost() const noexcept { return lost_; }

 private:
  using Clock = std::chrono::steady_clock;

  Status judged(GdsResult result) {
    if (result.lost) lost_ = true;
    return std::move(result.status);
  }

  static Status nothing(DeviceStageLane&, std::uint64_t) { return {}; }
  Status put(DeviceStageLane& lane, std::uint64_t piece) {
    pattern_.fill(piece, lane.host_memory().value());
    return lane.upload(kPieceBytes);
  }

  /// All pieces, by all threads. What `prepare` takes is not counted.
  template <class Prepare, class Work>
  Result<double> pass(const LoadFile& file, Prepare prepare, Work work) {
    std::atomic<std::uint64_t> next{0};
    std::mutex mutex;
    Status failure;
    Clock::duration longest{};  // a thread's time in `work`
    const auto run = [&](unsigned index) {
      const std::unique_ptr<DeviceStageLane> lane = stage_.make_lane(index);
      Clock::duration busy{};
      Status status = lane->attach();
      if (status.ok()) status = lane->host_memory().status();
      while (status.ok()) {
        const std::uint64_t piece = next.fetch_add(1);
        if (piece >= pieces_) break;
        status = prepare(*lane, piece);
        if (!status.ok()) break;
        const Clock::time_point begun = Clock::now();
        status = work(*lane, piece);
        busy += Clock::now() - begun;
      }
      if (!lane->stranded().ok()) lost_ = true;
      std::lock_guard lock(mutex);
      longest = std::max(longest, busy);
      if (status.ok()) return;
      next.store(pieces_);
      if (failure.ok()) failure = std::move(status);
    };
    {
      std::vector<std::jthread> threads;
      for (unsigned i = 0; i < threads_; ++i) threads.emplace_back(run, i);
    }
    const Clock::time_point begun = Clock::now();
    if (failure.ok() && ::fdatasync(file.fd()) != 0) failure = Status::from_errno(errno, "fdatasync " + file.path());
    longest += Clock::now() - begun;
    if (!failure.ok()) return failure;
    return static_cast<double>(pieces_ * kPieceBytes) / std::chrono::duration<double>(longest).count() / 1e9;
  }

  DeviceStage& stage_;
  const unsigned threads_;
  const std::uint64_t pieces_;
  const Pattern pattern_;
  std::atomic<bool> lost_{false};
};

/// `bytes` of a file in `directory` that has lost its name: whenever this process dies, nothing is left. O_DIRECT where it can be.
Result<std::shared_ptr<LoadFile>> make_scratch(const std::string& directory, std::uint64_t bytes) {
  std::random_device random;
  for (int attempt = 0; attempt < 16; ++attempt) {
    std::string path = directory + "/.gds-probe-" + std::to_string(::getpid()) + "-" + std::to_string(random());
    ProcessFd fd = ProcessFd::opened(
        [&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR); });
    if (!fd.valid() && errno == EEXIST) continue;
    if (!fd.valid()) return Status::from_errno(errno, "create " + path);
    if (::unlink(path.c_str()) != 0) return Status::from_errno(errno, "unlink " + path);
    if (const int error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes)); error != 0)
      return Status::from_errno(error, "allocate " + std::to_string(bytes) + " bytes for " + path);
    const int flags = ::fcntl(fd.get(), F_GETFL);
    if (flags < 0 || (::fcntl(fd.get(), F_SETFL, flags | O_DIRECT) != 0 && errno != EINVAL && errno != EOPNOTSUPP))
      return Status::from_errno(errno, "fcntl " + path);
    return LoadFile::adopt(std::move(path), std::move(fd), true, nullptr);
  }
  return Status(Code::kIoError, "no free name for a scratch file in " + directory);
}

/// The scratch file as the plugin opens it, or why it does not.
struct GdsSide {
  std::shared_ptr<LoadFile> file;
  GdsReader::State state;
  std::string failure;
};
GdsSide open_gds(const GdsProbeOptions& options, DeviceStage& stage, const LoadFile& scratch, bool allow_compat) {
  GdsSide side;
  Result<std::shared_ptr<GdsReader>> reader = GdsReader::make(*options.plugin, options.in_flight, allow_compat);
  if (!reader.ok()) return {nullptr, {}, reader.status().message()};
  if (options.device >= 0) {
    if (Status status = (*reader)->register_memory(stage.base(), stage.bytes()); !status.ok())
      return {nullptr, {}, status.message()};
  }
  ProcessFd fd = ProcessFd::opened([&] { return ::fcntl(scratch.fd(), F_DUPFD_CLOEXEC, 0); });
  if (!fd.valid()) return {nullptr, {}, Status::from_errno(errno, "fcntl " + scratch.path()).message()};
  Result<std::shared_ptr<LoadFile>> file = LoadFile::adopt(scratch.path(), std::move(fd), true, std::move(reader).value());
  if (!file.ok()) return {nullptr, {}, file.status().message()};
  if (!(*file)->gds_status().ok()) return {nullptr, {}, (*file)->gds_status().message()};
  const GdsReader::State state = (*file)->gds_state();
  return {std::move(file).value(), state, ""};
}

GdsSide choose_gds(const GdsProbeOptions& options, DeviceStage& stage, const LoadFile& scratch, GdsProbe& probe) {
  if (options.plugin == nullptr) {
    probe.reason = "the plugin is not loaded";
    return {};
  }
  if (const Status status = check_lost(); !status.ok()) {
    probe.reason = status.message();
    return {};
  }
  if (options.device < 0) {
    probe.reason = "no CUDA device: GPUDirect Storage reads into device memory only";
  } else {
    GdsSide real = open_gds(options, stage, scratch, false);
    if (real.file) {
      probe.mode = "gds";
      probe.reason = real.state.reason;
      return real;
    }
    probe.reason = real.failure;
  }
  GdsSide compat = open_gds(options, stage, scratch, true);
  if (compat.file) {
    probe.mode = "compat";
  } else {
    probe.reason += "; nor does kvikio work without it: " + compat.failure;
  }
  return compat;
}

/// Leaves probe.mode "none" when GDS does not do what it should.
void measure_gds(Prober& prober, const LoadFile& file, GdsProbe& probe) {
  const auto failed = [&](const Status& status) {
    probe.mode = "none";
    probe.reason = status.code() == Code::kCorruption ? "reading through it gave other bytes than were written: " + status.message()
                                                      : status.message();
    probe.gds_read = probe.gds_write = 0;
  };
  Result<double> written = prober.gds_write(file);
  if (!written.ok()) return failed(written.status());
  if (Result<double> right = prober.gds_read(file, true); !right.ok()) return failed(right.status());
  Result<double> read = prober.gds_read(file, false);
  if (!read.ok()) return failed(read.status());
  probe.gds_write = *written;
  probe.gds_read = *read;
}

}  // namespace

Result<GdsProbe> probe_gds(const GdsProbeOptions& options) {
  if (options.in_flight < 1 || options.in_flight > 64) {
    return Status(Code::kInvalidArgument, "in_flight is " + std::to_string(options.in_flight) + ", must be in 1..64");
  }
  const std::uint64_t pieces = std::max<std::uint64_t>(1, options.bytes / kPieceBytes);
  Result<std::unique_ptr<DeviceStage>> stage = make_stage(nullptr, nullptr, {kPieceBytes, options.in_flight}, options.device);
  if (!stage.ok()) return stage.status();
  Result<std::shared_ptr<LoadFile>> host = make_scratch(options.directory, pieces * kPieceBytes);
  if (!host.ok()) return host.status();
  GdsProbe probe;
  GdsSide gds;
  std::optional<Prober> prober;
  const std::shared_ptr<void> given_back(nullptr, [&](void*) {
    if (prober && prober->lost()) return keep_lost({std::shared_ptr<DeviceStage>(std::move(*stage)), std::move(gds.file)});
    static_cast<void>((*stage)->on_device([&] {
      gds.file.reset();
      return Status();
    }));
  });
  LMCN_RETURN_IF_ERROR((*stage)->on_device([&] {
    gds = choose_gds(options, **stage, **host, probe);
    return Status();
  }));

  if (probe.mode != "gds" && !options.measure_without_gds) return probe;
  prober.emplace(**stage, options.in_flight, pieces);
  Result<double> written = prober->host_write(**host);
  if (!written.ok()) return written.status();
  probe.host_write = *written;
  Result<double> right = prober->host_read(**host, true);
  if (!right.ok()) return Status(Code::kIoError, "scratch file in " + options.directory + ": " + right.status().message());
  Result<double> read = prober->host_read(**host, false);
  if (!read.ok()) return read.status();
  probe.host_read = *read;
  if (gds.file) measure_gds(*prober, *gds.file, probe);
  return probe;
}

}  // namespace lmcn
