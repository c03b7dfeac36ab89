#include "simulated_device.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <system_error>

#include "nvme/format.hpp"

namespace lmcn::crash {
namespace {

constexpr std::uint64_t kSectorBytes = 512;
constexpr std::uint64_t kWordBytes = 8;      // finer than devices tear, for headers, whose fields lie in one sector
constexpr std::uint64_t kFieldsBytes = 128;  // where those fields are
constexpr const char* kSmallFiles[] = {"superblock", "index.ckpt"};

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::string name_of(int fd) {
  return std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)).filename();
}

std::optional<std::vector<std::byte>> content_of(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return std::nullopt;
  std::vector<char> text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  return std::vector<std::byte>(bytes, bytes + text.size());
}

// With holes where there are zeros.
void make_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes.size())) != 0) fail(path);
  const auto zeros = [&](std::uint64_t at) {
    const auto page = bytes.subspan(at, std::min<std::uint64_t>(kPageBytes, bytes.size() - at));
    return page[0] == std::byte{} && std::equal(page.begin() + 1, page.end(), page.begin());
  };
  for (std::uint64_t at = 0; at < bytes.size(); at += kPageBytes) {
    const std::uint64_t begin = at;
    while (at < bytes.size() && !zeros(at)) at += kPageBytes;
    const std::uint64_t length = std::min<std::uint64_t>(at, bytes.size()) - begin;
    if (::pwrite(fd, bytes.data() + begin, length, static_cast<off_t>(begin)) != static_cast<ssize_t>(length)) fail(path);
  }
  ::close(fd);
}

}  // namespace

Status SimulatedDevice::register_fd(int fd) {
  data_fd_ = fd;
  settle_data();
  settle_small_files();
  return {};
}

void SimulatedDevice::submit(std::span<const io::IoRequest> requests) {
  for (const io::IoRequest& request : requests) {
    if (on_event) on_event();
    Waiting waiting{.request = request};
    if (request.fd == data_fd_ && request.op == io::Op::kWrite) {
      waiting.write = next_write_++;
      pending_[waiting.write] = {request.offset, Bytes(request.data, request.data + request.bytes)};
    } else if (request.fd == data_fd_ && request.op == io::Op::kSync) {
      for (const auto& [number, write] : pending_) {
        if (write.done) waiting.covers.push_back(number);
      }
      waiting.file_bytes = data_file_bytes();
      if (on_sync_begins) waiting.token = on_sync_begins();
    }
    if (mode_ == Mode::kAllAtOnce || (mode_ == Mode::kCall && depth_ == 0)) {
      // Others may end before it, as they would.
      while (mode_ == Mode::kCall && !queue_.empty() && random_.one_in(2)) step();
      perform(std::move(waiting));
    } else {
      queue_.push_back(std::move(waiting));
    }
  }
}

bool SimulatedDevice::step() {
  if (queue_.empty()) return false;
  const auto chosen = queue_.begin() + static_cast<std::ptrdiff_t>(random_.below(queue_.size()));
  Waiting waiting = std::move(*chosen);
  queue_.erase(chosen);
  perform(std::move(waiting));
  return true;
}

void SimulatedDevice::perform(Waiting waiting) {
  const io::IoRequest& request = waiting.request;
  io::IoResult result{.tag = request.tag, .expected = request.op == io::Op::kSync ? 0 : request.bytes};
  if (request.op == io::Op::kRead) {
    const ssize_t n = ::pread(request.fd, request.data, request.bytes, static_cast<off_t>(request.offset));
    if (n < 0) fail("pread");
    result.actual = static_cast<std::uint64_t>(n);
  } else if (request.op == io::Op::kWrite) {
    const ssize_t n = ::pwrite(request.fd, request.data, request.bytes, static_cast<off_t>(request.offset));
    if (n < 0) fail("pwrite");
    result.actual = static_cast<std::uint64_t>(n);
    if (waiting.write != 0) pending_.at(waiting.write).done = true;
  } else if (request.fd == data_fd_) {
    end_sync(waiting);
  } else {
    note_small_file_synced(request.fd);
  }
  if (on_event) on_event();
  ++depth_;
  request.sink->on_io(result);
  --depth_;
}

void SimulatedDevice::end_sync(const Waiting& waiting) {
  durable_.resize(std::max<std::uint64_t>(durable_.size(), waiting.file_bytes));
  for (const std::uint64_t number : waiting.covers) {
    const auto found = pending_.find(number);
    if (found == pending_.end()) continue;  // another fdatasync covered it
    apply(found->second);
    pending_.erase(found);
  }
  if (on_sync_ended) on_sync_ended(waiting.token);
}

void SimulatedDevice::apply(const Write& write) {
  durable_.resize(std::max<std::uint64_t>(durable_.size(), write.offset + write.bytes.size()));
  std::copy(write.bytes.begin(), write.bytes.end(), durable_.begin() + static_cast<std::ptrdiff_t>(write.offset));
}

std::uint64_t SimulatedDevice::data_file_bytes() const {
  struct stat found{};
  if (::fstat(data_fd_, &found) != 0) fail("fstat");
  return static_cast<std::uint64_t>(found.st_size);
}

void SimulatedDevice::settle_data() {
  durable_.resize(data_file_bytes());
  const ssize_t n = ::pread(data_fd_, durable_.data(), durable_.size(), 0);
  if (n != static_cast<ssize_t>(durable_.size())) fail("pread of the data file");
  pending_.clear();
}

void SimulatedDevice::settle_small_files() {
  for (const char* name : kSmallFiles) {
    auto& versions = small_files_[name];
    const std::optional<Bytes> now = content_of(directory_ / name);
    if (versions.empty() || (now && std::find(versions.begin(), versions.end(), now) != versions.end())) {
      versions.clear();
    } else if (now) {
      versions.push_back(Bytes());  // renamed without an fdatasync
    }
    versions.push_back(now);  // beside the old one when it was removed: no fsync of the directory follows that
  }
}

// name.tmp is about to be renamed: from here to the end of the call, name is old or new.
void SimulatedDevice::note_small_file_synced(int fd) {
  const std::filesystem::path temporary = name_of(fd);
  if (temporary.extension() == ".tmp") small_files_[temporary.stem()].push_back(content_of(directory_ / temporary));
}

void SimulatedDevice::cut_power(const std::filesystem::path& to, Random& random) const {
  std::filesystem::create_directory(to);
  std::filesystem::permissions(to, std::filesystem::perms::owner_all);
  for (const auto& [name, versions] : small_files_) {
    const auto& version = versions[random.below(versions.size())];
    if (version) make_file(to / name, *version);
    if (versions.back() && random.one_in(4)) {  // a leftover, of any length
      make_file(to / (name + ".tmp"), std::span(*versions.back()).first(random.below(versions.back()->size() + 1)));
    }
  }
  Bytes& image = image_;
  image = durable_;
  const std::uint64_t now_bytes = data_file_bytes();
  if (now_bytes > image.size() && random.one_in(2)) image.resize(now_bytes);
  const std::uint64_t taste = random.below(4);  // most there, most absent, or anything
  for (const auto& [number, write] : pending_) {
    for (std::uint64_t at = 0; at < write.bytes.size(); at += kPageBytes) {
      const std::uint64_t page_bytes = std::min<std::uint64_t>(kPageBytes, write.bytes.size() - at);
      const std::uint64_t dice = random.below(16);
      std::uint64_t bytes = page_bytes;
      std::uint64_t skip = 0;
      if (dice < (taste == 0 ? 1u : taste == 1 ? 12u : 6u)) continue;
      if (dice >= 13) {
        const std::uint64_t unit = random.one_in(2) ? kSectorBytes : kWordBytes;
        const std::uint64_t torn_at = random.below((unit == kWordBytes ? kFieldsBytes : page_bytes) / unit + 1) * unit;
        (random.one_in(2) ? bytes : skip) = std::min(torn_at, page_bytes);
      }
      if (write.offset + at + page_bytes > image.size()) break;  // beyond the end that survived
      std::copy_n(write.bytes.begin() + static_cast<std::ptrdiff_t>(at + skip), bytes - std::min(bytes, skip),
                  image.begin() + static_cast<std::ptrdiff_t>(write.offset + at + skip));
    }
  }
  make_file(to / "data.000", image);
}

}  // namespace lmcn::crash
