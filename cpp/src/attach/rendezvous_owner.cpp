#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>
#include <vector>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"
#include "attach/runtime_directory.hpp"
#include "base/fork_guard.hpp"
#include "memory/arena_mapping.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kDirectoryLockDeadline{2000};
constexpr std::chrono::milliseconds kAcceptPause{100};
// After the end of a worker's process: closing a device may be left to a thread of the kernel (NVIDIA's driver does so when a
// signal is pending), and a child that the worker forked may keep the device open, whose copies under way then run to their end.
constexpr std::chrono::milliseconds kDeviceGrace{500};
constexpr std::size_t kMaxPending = 128;  // connections that have not said hello yet
constexpr int kBacklog = 128;
constexpr int kMaxAcceptsAtOnce = kBacklog;
constexpr int kNap_ms = 10;

std::string file_name(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

// Held while a socket file is looked at and replaced or removed: two owners never both find it stale. flock on the directory
// itself leaves no file behind and ends with its holder.
Status lock_directory(int directory, const std::string& path) {
  const auto deadline = Clock::now() + kDirectoryLockDeadline;
  while (::flock(directory, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) return Status::from_errno(errno, "flock of the directory of " + path);
    if (Clock::now() >= deadline) return {Code::kLocked, "the directory of " + path + " stays locked by another process"};
    ::poll(nullptr, 0, 1);
  }
  return {};
}

// kLocked when somebody listens at `path`. A listener whose process has ended is none: a forked child merely kept its socket.
Status check_not_served(const std::string& path) {
  const UniqueFd probe = wire::seqpacket_socket();
  if (!probe.valid()) return Status::from_errno(errno, "socket");
  const wire::Address address = wire::address_of(path);
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) {
    if (errno == ECONNREFUSED || errno == ENOENT) return {};
    if (errno == EAGAIN) return {Code::kLocked, path + " is served by another process (which is busy)"};
    return Status::from_errno(errno, "connect to " + path);
  }
  auto peer = wire::peer_of(probe.get());
  if (!peer.ok()) return peer.status();
  if (wire::has_ended(peer->pid)) return {};
  return {Code::kLocked, path + " is served by process " + std::to_string(peer->pid)};
}

Status remove_stale(int directory, const std::string& path) {
  const std::string name = file_name(path);
  struct stat status{};
  if (::fstatat(directory, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
    return errno == ENOENT ? Status{} : Status::from_errno(errno, "fstatat of " + path);
  }
  if (!S_ISSOCK(status.st_mode)) return {Code::kInvalidArgument, path + " exists and is not a socket; remove it"};
  LMCN_RETURN_IF_ERROR(check_not_served(path));
  if (::unlinkat(directory, name.c_str(), 0) != 0 && errno != ENOENT)
    return Status::from_errno(errno, "unlink of the stale " + path);
  return {};
}

// Engines are killed more often than stopped and their ids are often random: each owner removes what dead ones left. Every owner
// binds and listens under the directory's lock, so a socket that refuses connections here is nobody's. What cannot be examined
// stays.
void remove_all_stale(int directory, const std::string& path) {
  constexpr int kMaxExamined = 1024;
  const std::string parent = path.substr(0, path.rfind('/') + 1);
  std::error_code error;
  std::filesystem::directory_iterator entry(parent, error);
  for (int i = 0; !error && entry != std::filesystem::directory_iterator() && i < kMaxExamined; ++i, entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name.ends_with(kSocketSuffix) && parent.size() + name.size() <= wire::kMaxPathBytes)
      (void)remove_stale(directory, parent + name);
  }
}

Result<ProcessFd> bind_and_listen(const std::string& path) {
  ProcessFd socket = ProcessFd::opened([] { return wire::seqpacket_socket().release(); });
  if (!socket.valid()) return Status::from_errno(errno, "socket");
  if (::fchmod(socket.get(), 0600) != 0)
    return Status::from_errno(errno, "fchmod of the socket for " + path);  // bind() takes it over
  const wire::Address address = wire::address_of(path);
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) {
    return Status::from_errno(errno, "bind to " + path);
  }
  if (::listen(socket.get(), kBacklog) != 0) return Status::from_errno(errno, "listen on " + path);
  return socket;
}

Status check_arguments(int memfd, const ArenaHandle& handle) {
  if (handle.rank_count == 0 || handle.rank_count > kMaxRanks) {
    return {Code::kInvalidArgument,
            "rank_count is " + std::to_string(handle.rank_count) + ", must be 1 to " + std::to_string(kMaxRanks)};
  }
  if (handle.rank_bytes == 0) return {Code::kInvalidArgument, "rank_bytes is 0"};
  struct stat status{};
  if (::fstat(memfd, &status) != 0)
    return Status::from_errno(errno, "fstat of the arena's memfd " + std::to_string(memfd), Code::kInvalidArgument);
  if (static_cast<std::uint64_t>(status.st_size) != handle.arena_bytes) {
    return {Code::kInvalidArgument,
            "arena_bytes is " + std::to_string(handle.arena_bytes) + ", the memfd has " + std::to_string(status.st_size)};
  }
  return {};
}

// Kept so that one connection can be accepted, and told why it is refused, when nothing else is free: neither a number of this
// process nor, with luck, a file of the system.
ProcessFd spare_descriptor() {
  return ProcessFd::opened([] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); });
}

// One worker's connection. Attached, it ends with a goodbye, which says that no copy is under way, or with its process: a socket
// may be closed before the process's work on a device has ended, and a child that the worker forked may hold it for long.
struct Connection {
  ProcessFd socket;  // invalid: the worker has closed it, or said something that it should not
  UniqueFd process;  // pidfd; invalid where the kernel has or allows none
  pid_t pid = 0;
  bool exited() const { return gone_at != Clock::time_point::max(); }
  bool attached = false;
  std::uint32_t rank = 0;
  Clock::time_point hello_deadline;
  Clock::time_point gone_at = Clock::time_point::max();  // its process has ended: when its rank is free
};

struct Prepared {
  std::string path;
  UniqueFd directory;
  ProcessFd listener;
  UniqueFd wake;
  struct stat file{};  // the socket file, so that only our own is ever removed
};

// Every connection is answered or closed within wire::kHelloDeadline, plus what the machine and gone() take, whatever other peers
// do and whatever this process runs out of: the thread waits in poll() alone, everything else it calls returns at once.
class SocketOwner final : public RendezvousOwner {
 public:
  SocketOwner(Prepared prepared, int memfd, const ArenaHandle& handle, RankGone gone)
      : prepared_(std::move(prepared)), memfd_(memfd), handle_(handle), gone_(std::move(gone)) {}

  ~SocketOwner() override {
    if (::getpid() != pid_) {
      // In a forked child neither the thread nor the socket file are ours to end.
      new std::thread(std::move(thread_));  // NOLINT: leaked on purpose
      return;
    }
    if (!thread_.joinable()) {
      remove_file();
      return;
    }
    stop_.store(true, std::memory_order_release);
    const std::uint64_t one = 1;
    while (::write(prepared_.wake.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
    thread_.join();
    remove_file();
  }

  Status start() {
    try {
      thread_ = std::thread([this] { run(); });
    } catch (const std::system_error& error) {
      return Status::from_errno(error.code().value(), "thread to serve " + prepared_.path, Code::kResourceExhausted);
    }
    return {};
  }

  const std::string& path() const noexcept override { return prepared_.path; }
  std::uint32_t attached_ranks() const noexcept override { return attached_.load(std::memory_order_acquire); }

 private:
  void run() {
    std::vector<pollfd> events;
    for (;;) {
      events.clear();
      events.push_back({prepared_.wake.get(), POLLIN, 0});
      if (accept_paused_ && Clock::now() >= accept_again_) accept_paused_ = false;
      events.push_back({accept_paused_ ? -1 : prepared_.listener.get(), POLLIN, 0});
      for (const Connection& connection : connections_) {
        events.push_back({connection.socket.get(), POLLIN, 0});
        // A negative descriptor is passed over. What has been seen to end would be told again at once.
        events.push_back({connection.exited() ? -1 : connection.process.get(), POLLIN, 0});
      }
      if (!wait(events)) continue;
      if (events[0].revents != 0 || stop_.load(std::memory_order_acquire)) return;
      // Ends first: a worker that was started anew may ask for the rank of the one that has just died.
      std::size_t i = 0;
      std::erase_if(connections_, [&](Connection& connection) {
        const bool readable = events[2 + 2 * i].revents != 0, process_ended = events[3 + 2 * i].revents != 0;
        ++i;
        return serve(connection, readable, process_ended);
      });
      if (events[1].revents != 0) accept_some();
    }
  }

  // false: nothing is known of them.
  bool wait(std::vector<pollfd>& events) const {
    const int timeout = timeout_ms();
    if (::poll(events.data(), events.size(), timeout) >= 0) return true;
    if (errno == EINTR) return false;
    // No memory for so many, or RLIMIT_NOFILE, which is poll()'s limit too, was lowered since they were opened.
    bool any = false;
    for (pollfd& event : events) {
      event.revents = 0;
      any = ::poll(&event, 1, 0) > 0 || any;
    }
    if (!any) ::poll(nullptr, 0, timeout < 0 ? kNap_ms : std::min(timeout, kNap_ms));
    return true;
  }

  int timeout_ms() const {
    auto next = Clock::time_point::max();
    for (const Connection& connection : connections_) {
      next = std::min(next, connection.attached ? connection.gone_at : connection.hello_deadline);
    }
    if (accept_paused_) next = std::min(next, accept_again_);
    if (next == Clock::time_point::max()) return -1;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count() + 1;
    return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1 << 30));
  }

  // true: the connection has ended.
  bool serve(Connection& connection, bool readable, bool process_ended) {
    if (connection.attached) return serve_attached(connection, readable, process_ended);
    if (readable) return !greet(connection);
    return process_ended || Clock::now() >= connection.hello_deadline;
  }

  bool serve_attached(Connection& connection, bool readable, bool process_ended) {
    if (readable) {
      const bool goodbye = wire::receive_goodbye(connection.socket.get()).ok();
      connection.socket.reset();
      if (goodbye) {
        leave(connection);
        return true;
      }
    }
    // Where nobody tells when the process ends, its socket's end is all there is to know.
    const bool over = process_ended || (!connection.socket.valid() && !connection.process.valid());
    if (over && !connection.exited()) connection.gone_at = Clock::now() + kDeviceGrace;
    if (Clock::now() < connection.gone_at) return false;
    leave(connection);
    return true;
  }

  bool greet(Connection& connection) {
    wire::Hello hello;
    Status status = wire::receive_hello(connection.socket.get(), hello);
    if (status.code() == Code::kUnavailable) return false;
    if (status.ok()) status = check(hello);
    if (!status.ok()) {
      (void)wire::send_reply(connection.socket.get(), wire::refusal(status), -1);  // a peer that is gone needs no answer
      return false;
    }
    wire::Reply reply;
    reply.arena_bytes = handle_.arena_bytes;
    reply.rank_bytes = handle_.rank_bytes;
    reply.rank_count = handle_.rank_count;
    reply.owner_pid = handle_.owner_pid;
    connection.attached = true;
    connection.rank = hello.rank;
    attached_.fetch_add(1, std::memory_order_release);
    if (wire::send_reply(connection.socket.get(), reply, memfd_).ok()) return true;
    leave(connection);
    return false;
  }

  Status check(const wire::Hello& hello) const {
    if (hello.version != wire::kVersion) {
      return {Code::kUnsupported, "the worker speaks version " + std::to_string(hello.version) +
                                      " of the attach protocol, the owner (process " + std::to_string(::getpid()) + ") version " +
                                      std::to_string(wire::kVersion)};
    }
    if (hello.rank >= handle_.rank_count) {
      return {Code::kInvalidArgument, "rank is " + std::to_string(hello.rank) + ", the owner expects " +
                                          std::to_string(handle_.rank_count) + " ranks (from 0)"};
    }
    if (hello.rank_bytes != handle_.rank_bytes) {
      return {Code::kInvalidArgument,
              "rank_bytes is " + std::to_string(hello.rank_bytes) + ", the owner expects " + std::to_string(handle_.rank_bytes)};
    }
    if (hello.replicated != (handle_.replicated ? 1u : 0u)) {
      return {Code::kInvalidArgument, "replicated is " + std::to_string(hello.replicated) + ", the owner expects " +
                                          (handle_.replicated ? "1: one part of a slot for all ranks" : "0: a part for each rank")};
    }
    for (const Connection& connection : connections_) {
      if (connection.attached && connection.rank == hello.rank) {
        return {Code::kLocked, "rank " + std::to_string(hello.rank) + " is attached already, by process " +
                                   std::to_string(connection.pid) +
                                   (connection.socket.valid() ? "" : ", whose connection has ended: its copies may not have")};
      }
    }
    return {};
  }

  void leave(Connection& connection) {
    connection.attached = false;
    attached_.fetch_sub(1, std::memory_order_release);
    if (gone_) gone_(connection.rank);
  }

  ProcessFd next_connection() const {
    return ProcessFd::opened(
        [this] { return ::accept4(prepared_.listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK); });
  }

  // Not until the queue is empty: whoever connects fast enough would keep the thread here.
  void accept_some() {
    for (int i = 0; i < kMaxAcceptsAtOnce; ++i) {
      if (!spare_.valid()) spare_ = spare_descriptor();
      Status shortage;
      ProcessFd socket = next_connection();
      int error = socket.valid() ? 0 : errno;
      if (error == EMFILE || error == ENFILE) {
        shortage = Status::from_errno(error, "accept by the owner (process " + std::to_string(pid_) + ")", Code::kUnavailable);
        spare_.reset();
        socket = next_connection();
        error = socket.valid() ? 0 : errno;
      }
      if (error == 0) accept(std::move(socket), std::move(shortage));
      if (error == 0 || error == EINTR || error == ECONNABORTED) continue;
      // Anything but an empty queue would come back at once, for as long as it lasts.
      accept_paused_ = error != EAGAIN;
      accept_again_ = Clock::now() + kAcceptPause;
      break;
    }
    if (!spare_.valid()) spare_ = spare_descriptor();
  }

  void accept(ProcessFd socket, Status status) {
    const auto peer = wire::peer_of(socket.get());
    if (!peer.ok()) return;
    if (peer->uid != ::geteuid()) {
      status = {Code::kInvalidArgument,
                "uid " + std::to_string(peer->uid) + " may not attach to the arena of uid " + std::to_string(::geteuid())};
    } else if (status.ok() && pending() >= kMaxPending) {
      status = {Code::kUnavailable, "too many connections wait to be greeted (" + std::to_string(kMaxPending) + ")"};
    }
    Connection connection;
    if (status.ok()) {
      // Without it a rank counts as gone soon after its socket's end, which says nothing of its copies.
      Result<UniqueFd> process = wire::peer_process(socket.get(), peer->pid);
      if (process.ok()) {
        connection.process = std::move(process).value();
      } else {
        status = {process.status().code(), process.status().message() + " in the owner (process " + std::to_string(pid_) + ")"};
      }
    }
    if (!status.ok()) {
      (void)wire::send_reply(socket.get(), wire::refusal(status), -1);
      return;
    }
    connection.socket = std::move(socket);
    connection.pid = peer->pid;
    connection.hello_deadline = Clock::now() + wire::kHelloDeadline;
    connections_.push_back(std::move(connection));
  }

  std::size_t pending() const {
    return static_cast<std::size_t>(
        std::count_if(connections_.begin(), connections_.end(), [](const Connection& c) { return !c.attached; }));
  }

  void remove_file() {
    // Without the lock nothing is removed: the next owner finds a stale file, which it can tell.
    if (!lock_directory(prepared_.directory.get(), prepared_.path).ok()) return;
    const std::string name = file_name(prepared_.path);
    struct stat status{};
    if (::fstatat(prepared_.directory.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        status.st_dev == prepared_.file.st_dev && status.st_ino == prepared_.file.st_ino) {
      ::unlinkat(prepared_.directory.get(), name.c_str(), 0);
    }
    ::flock(prepared_.directory.get(), LOCK_UN);
  }

  const pid_t pid_ = ::getpid();
  const Prepared prepared_;
  const int memfd_;
  const ArenaHandle handle_;
  const RankGone gone_;
  std::atomic<std::uint32_t> attached_{0};
  std::atomic<bool> stop_{false};  // `wake` ends the wait for events, unless poll() takes no descriptor at all
  // The thread's own.
  std::vector<Connection> connections_;
  ProcessFd spare_ = spare_descriptor();
  bool accept_paused_ = false;
  Clock::time_point accept_again_;
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<RendezvousOwner>> RendezvousOwner::listen(const std::string& engine_id, int memfd, const ArenaHandle& handle,
                                                                 RankGone gone) {
  LMCN_RETURN_IF_ERROR(check_arguments(memfd, handle));
  Prepared prepared;
  auto path = socket_path(engine_id);
  if (!path.ok()) return path.status();
  prepared.path = *path;
  auto directory = open_private_directory(path->substr(0, path->rfind('/')));
  if (!directory.ok()) return directory.status();
  prepared.directory = std::move(*directory);
  prepared.wake.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!prepared.wake.valid()) return Status::from_errno(errno, "eventfd");

  LMCN_RETURN_IF_ERROR(lock_directory(prepared.directory.get(), *path));
  Status status = remove_stale(prepared.directory.get(), *path);
  if (status.ok()) {
    remove_all_stale(prepared.directory.get(), *path);
    auto listener = bind_and_listen(*path);
    status = listener.status();
    if (listener.ok()) prepared.listener = std::move(*listener);
  }
  if (status.ok() && ::fstatat(prepared.directory.get(), file_name(*path).c_str(), &prepared.file, AT_SYMLINK_NOFOLLOW) != 0) {
    status = Status::from_errno(errno, "fstatat of " + *path);
  }
  ::flock(prepared.directory.get(), LOCK_UN);
  if (!status.ok()) return status;

  auto owner = std::make_unique<SocketOwner>(std::move(prepared), memfd, handle, std::move(gone));
  LMCN_RETURN_IF_ERROR(owner->start());
  return std::unique_ptr<RendezvousOwner>(std::move(owner));
}

}  // namespace lmcn
