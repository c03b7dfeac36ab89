#include "nvme/directory.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

namespace lmcn::nvme {
namespace {

constexpr std::chrono::milliseconds kLockRetry{20};

std::string octal(mode_t mode) {
  char text[16];
  std::snprintf(text, sizeof text, "%04o", static_cast<unsigned>(mode & 07777));
  return text;
}

// Like mkdir -p with 0700 for whatever is missing, whatever the umask. (A chmod that fails shows when the directory is opened.)
Status make_directories(const std::string& path) {
  for (std::size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    if (::mkdir(part.c_str(), 0700) == 0) {
      static_cast<void>(::fchmodat(AT_FDCWD, part.c_str(), 0700, AT_SYMLINK_NOFOLLOW));
    } else if (errno != EEXIST) {
      const int error = errno;
      struct stat found{};
      if (::stat(part.c_str(), &found) == 0) {  // e.g. a read-only or unwritable parent that exists
        if (end == std::string::npos) return {};
        continue;
      }
      return Status::from_errno(error, "cannot make the store directory " + part);
    }
    if (end == std::string::npos) return {};
  }
}

// The kernel's word where it gives one: a tool that only looks leaves no pid in the file.
std::string lock_owner(int fd) {
  struct stat found{};
  std::ifstream locks("/proc/locks");
  if (::fstat(fd, &found) == 0) {
    char place[64];
    std::snprintf(place, sizeof place, "%02x:%02x:%ju", ::major(found.st_dev), ::minor(found.st_dev),
                  static_cast<std::uintmax_t>(found.st_ino));
    // "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF"; waiting ones have "->" after the number.
    for (std::string number, kind, mode, access, pid, where, rest; locks >> number >> kind >> mode >> access >> pid >> where;) {
      std::getline(locks, rest);
      if (kind == "FLOCK" && where == place && pid != "0" && pid[0] != '-') return pid;
    }
  }
  char text[32] = {};
  const ssize_t n = ::pread(fd, text, sizeof text - 1, 0);
  std::string pid;
  for (ssize_t i = 0; i < n && text[i] >= '0' && text[i] <= '9'; ++i) pid.push_back(text[i]);
  return pid.empty() ? "unknown" : pid;
}

}  // namespace

std::atomic<int (*)(int fd, struct statfs* found)> fstatfs_call{::fstatfs};

// Not FUSE (0x65735546): some of those are local, and the type does not say which.
const char* network_file_system(std::uint64_t f_type) noexcept {
  switch (f_type & 0xFFFFFFFFu) {  // the type is signed on some machines
    case 0x6969:
      return "NFS";
    case 0x517B:
    case 0xFF534D42:
    case 0xFE534D42:
      return "SMB/CIFS";
    case 0x00C36400:
      return "Ceph";
    case 0x5346414F:
    case 0x6B414653:
      return "AFS";
    case 0x0BD00BD0:
      return "Lustre";
    case 0x47504653:
      return "GPFS";
    case 0x01021997:
      return "9p";
    case 0x19830326:
      return "BeeGFS";
    case 0x7461636F:
      return "OCFS2";
    case 0x01161970:
      return "GFS2";
    default:
      return nullptr;
  }
}

Result<std::unique_ptr<Directory>> Directory::open(const std::string& path, std::chrono::milliseconds lock_wait,
                                                   bool allow_network) {
  if (path.empty()) return Status(Code::kInvalidArgument, "store directory: empty path");
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();  // "link/" would be followed
  LMCN_RETURN_IF_ERROR(make_directories(name));
  Result<std::unique_ptr<Directory>> directory = open_unlocked(name, allow_network);
  if (!directory.ok()) return directory;
  LMCN_RETURN_IF_ERROR((*directory)->lock(lock_wait));
  return directory;
}

Result<std::unique_ptr<Directory>> Directory::open_existing(const std::string& path, bool exclusive) {
  if (path.empty()) return Status(Code::kInvalidArgument, "store directory: empty path");
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  Result<std::unique_ptr<Directory>> directory = open_unlocked(name, true);
  if (!directory.ok()) return directory;
  (*directory)->looks_ = !exclusive;
  Result<Fd> lock = (*directory)->open_file("LOCK", O_RDONLY);
  if (lock.status().code() == Code::kNotFound) {
    return Status(Code::kNotFound, name + " is not a store directory: it has no LOCK file");
  }
  if (!lock.ok()) return lock.status();
  while (::flock(lock->get(), (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return Status::from_errno(errno, "flock " + (*directory)->path_of("LOCK"));
    return Status(Code::kLocked,
                  "store directory " + name + " is in use by pid " + lock_owner(lock->get()) + "; stop that process first");
  }
  (*directory)->lock_ = std::move(lock).value();
  return directory;
}

Result<std::unique_ptr<Directory>> Directory::open_unlocked(const std::string& name, bool allow_network) {
  Fd fd = Fd::opened([&] { return ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); });
  if (!fd.valid()) {
    const int error = errno;
    struct stat found{};
    if (::lstat(name.c_str(), &found) == 0 && S_ISLNK(found.st_mode)) {
      return Status(Code::kInvalidArgument, "store directory " + name + " is a symbolic link; name the directory itself");
    }
    if (error == ENOTDIR) return Status(Code::kInvalidArgument, "store directory " + name + " is not a directory");
    if (error == ENOENT) return Status::from_errno(error, "no such directory: " + name, Code::kNotFound);
    return Status::from_errno(error, "cannot open the store directory " + name);
  }
  struct statfs file_system{};
  if (fstatfs_call.load()(fd.get(), &file_system) != 0) return Status::from_errno(errno, "statfs " + name);
  if (const char* kind = network_file_system(static_cast<std::uint64_t>(file_system.f_type)); kind != nullptr && !allow_network) {
    return Status(Code::kInvalidArgument, "store directory " + name + " is on a network file system (" + kind +
                                              "): name one on a local disk, or set allow_network_file_system "
                                              "(local_disk_allow_network in a configuration)");
  }
  struct stat found{};
  if (::fstat(fd.get(), &found) != 0) return Status::from_errno(errno, "fstat " + name);
  if (found.st_uid != ::geteuid()) {
    return Status(Code::kInvalidArgument, "store directory " + name + " belongs to uid " + std::to_string(found.st_uid) +
                                              ", this process runs as " + std::to_string(::geteuid()) +
                                              "; name a directory of its own or one that does not exist yet");
  }
  if ((found.st_mode & 077) != 0) {
    return Status(Code::kInvalidArgument, "store directory " + name + " has mode " + octal(found.st_mode) +
                                              ", it must be private (0700): chmod 700 it, or name one that does not exist yet");
  }
  return std::unique_ptr<Directory>(new Directory(name, std::move(fd)));
}

Status Directory::lock(std::chrono::milliseconds wait) {
  Result<Fd> opened = open_file("LOCK", O_RDWR | O_CREAT);
  if (!opened.ok()) return opened.status();
  const auto deadline = std::chrono::steady_clock::now() + wait;
  // flock has no timed form; the owner is another process.
  while (::flock(opened->get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) return Status::from_errno(errno, "flock " + path_of("LOCK"));
    if (std::chrono::steady_clock::now() >= deadline) {
      return Status(Code::kLocked, "store directory " + path_ + " is in use by pid " + lock_owner(opened->get()) + " (waited " +
                                       std::to_string(wait.count()) + " ms for " + path_of("LOCK") + ")");
    }
    std::this_thread::sleep_for(kLockRetry);
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(opened->get(), 0) != 0 ||
      ::pwrite(opened->get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return Status::from_errno(errno, "write " + path_of("LOCK"));
  }
  lock_ = std::move(opened).value();
  return {};
}

Directory::~Directory() {
  unlock();
}

void Directory::unlock() noexcept {
  // Explicitly: a child made by clone() would hold the same open file description.
  if (lock_.valid()) ::flock(lock_.get(), LOCK_UN);
  lock_.reset();
}

Result<Fd> Directory::open_file(const std::string& name, int flags) const {
  Fd fd = Fd::opened([&] { return ::openat(fd_.get(), name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600); });
  if (!fd.valid()) {
    const int error = errno;
    if (error == ENOENT) return Status::from_errno(error, "open " + path_of(name), Code::kNotFound);
    if (error == ELOOP) return Status(Code::kInvalidArgument, path_of(name) + " is a symbolic link; remove it");
    return Status::from_errno(error, "open " + path_of(name));
  }
  struct stat found{};
  if (::fstat(fd.get(), &found) != 0) return Status::from_errno(errno, "fstat " + path_of(name));
  if (!S_ISREG(found.st_mode) || found.st_uid != ::geteuid() || found.st_nlink != 1) {
    return Status(Code::kInvalidArgument,
                  path_of(name) + " must be a regular file with one link, owned by uid " + std::to_string(::geteuid()));
  }
  // O_NONBLOCK was against a FIFO in its place; left on, io_uring would end I/O with EAGAIN.
  const int now = ::fcntl(fd.get(), F_GETFL);
  if (now < 0 || ::fcntl(fd.get(), F_SETFL, now & ~O_NONBLOCK) != 0) return Status::from_errno(errno, "fcntl " + path_of(name));
  if (!looks_ && (found.st_mode & 07777) != 0600 && ::fchmod(fd.get(), 0600) != 0) {
    return Status::from_errno(errno, "chmod " + path_of(name));
  }
  return fd;
}

Status Directory::rename(const std::string& from, const std::string& to) const {
  if (::renameat(fd_.get(), from.c_str(), fd_.get(), to.c_str()) == 0) return {};
  return Status::from_errno(errno, "rename " + path_of(from) + " to " + to);
}

Status Directory::remove(const std::string& name) const {
  if (::unlinkat(fd_.get(), name.c_str(), 0) == 0 || errno == ENOENT) return {};
  return Status::from_errno(errno, "unlink " + path_of(name));
}

Status Directory::sync() const {
  if (::fsync(fd_.get()) == 0) return {};
  return Status::from_errno(errno, "fsync " + path_);
}

Result<std::uint64_t> Directory::file_system_bytes() const {
  struct statvfs found{};
  if (::fstatvfs(fd_.get(), &found) != 0) return Status::from_errno(errno, "statvfs " + path_);
  return std::uint64_t{found.f_blocks} * found.f_frsize;
}

Result<std::uint64_t> Directory::free_bytes() const {
  struct statvfs found{};
  if (::fstatvfs(fd_.get(), &found) != 0) return Status::from_errno(errno, "statvfs " + path_);
  return std::uint64_t{found.f_bavail} * found.f_frsize;
}

Result<FileReplacement> FileReplacement::create(const Directory& directory, io::IoEngine& engine, std::string name,
                                                InFlight* in_flight) {
  const InFlight::Scope scope(in_flight, InFlight::Lane::kDirect);
  LMCN_RETURN_IF_ERROR(directory.remove(name + ".tmp"));
  Result<Fd> fd = directory.open_file(name + ".tmp", O_RDWR | O_CREAT | O_EXCL);
  if (!fd.ok()) return fd.status();
  return FileReplacement(directory, engine, std::move(name), in_flight, std::move(fd).value());
}

FileReplacement::~FileReplacement() {
  if (!fd_.valid()) return;
  const InFlight::Scope scope(in_flight_, InFlight::Lane::kDirect);
  // open() removes leftovers too; nothing more can be done here.
  static_cast<void>(directory_->remove(name_ + ".tmp"));
}

io::IoResult FileReplacement::run(io::IoRequest request) {
  const InFlight::Scope scope(in_flight_, InFlight::lane_of(request.op));
  request.fd = fd_.get();
  return io::run_sync(*engine_, request);
}

Status FileReplacement::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  io::IoRequest request;
  request.op = io::Op::kWrite;
  request.data = const_cast<std::byte*>(bytes.data());
  request.bytes = bytes.size();
  request.offset = offset;
  return run(request).status("write " + directory_->path_of(name_ + ".tmp"));
}

Status FileReplacement::commit() {
  io::IoRequest request;
  request.op = io::Op::kSync;
  LMCN_RETURN_IF_ERROR(run(request).status("fdatasync " + directory_->path_of(name_ + ".tmp")));
  const InFlight::Scope scope(in_flight_, InFlight::Lane::kDirect);
  LMCN_RETURN_IF_ERROR(directory_->rename(name_ + ".tmp", name_));
  fd_.reset();
  return directory_->sync();
}

Result<std::optional<Superblock>> load_superblock(const Directory& directory, io::IoEngine& engine) {
  const std::string path = directory.path_of("superblock");
  Result<Fd> fd = directory.open_file("superblock", O_RDONLY);
  if (fd.status().code() == Code::kNotFound) return std::optional<Superblock>();
  if (!fd.ok()) return fd.status();
  Superblock superblock{};
  io::IoRequest request;
  request.fd = fd->get();
  request.data = reinterpret_cast<std::byte*>(&superblock);
  request.bytes = sizeof superblock;
  const io::IoResult result = io::run_sync(engine, request);
  if (result.error != 0) return result.status("read " + path);
  if (result.actual >= 12 && superblock.magic == kSuperblockMagic && superblock.format != kFormatVersion) {
    return Status(Code::kFormatVersion, path + " has format version " + std::to_string(superblock.format) + ", this build knows " +
                                            std::to_string(kFormatVersion) +
                                            "; nothing was changed: use the other version, or another directory");
  }
  if (result.actual != sizeof superblock || !page_holds(superblock, kSuperblockMagic)) {
    return Status(Code::kCorruption, path + " is not a whole superblock (magic, length or checksum); nothing was changed: remove " +
                                         directory.path() + " to start anew");
  }
  const std::uint64_t region_bytes = superblock.region_bytes;
  if (region_bytes < 4 * kPageBytes || region_bytes % kPageBytes != 0 || region_bytes > (std::uint64_t{1} << 43)) {
    return Status(Code::kCorruption, path + ": region_bytes=" + std::to_string(region_bytes) +
                                         " must be a multiple of 4096 from 16384 to 2^43; nothing was changed: remove " +
                                         directory.path() + " to start anew");
  }
  return std::optional<Superblock>(superblock);
}

Status store_superblock(const Directory& directory, io::IoEngine& engine, Superblock& superblock, InFlight* in_flight) {
  superblock.magic = kSuperblockMagic;
  seal_page(superblock);
  Result<FileReplacement> file = FileReplacement::create(directory, engine, "superblock", in_flight);
  if (!file.ok()) return file.status();
  LMCN_RETURN_IF_ERROR(file->write_at(0, std::as_bytes(std::span(&superblock, 1))));
  return file->commit();
}

}  // namespace lmcn::nvme
