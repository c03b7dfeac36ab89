// The messages of the arena's socket. Input: a byte of flags, a number of descriptors (0..3) that come along, then one message.
//   0  a hello, received from a socket pair
//   1  a reply, received from a socket pair
//   2  a hello to a real owner; a valid one, and no other, gets the arena
#include <dirent.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"
#include "memory/host_arena.hpp"
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

constexpr std::uint64_t kArenaBytes = 2 << 20;
constexpr std::uint64_t kRankBytes = 4096;
constexpr std::uint32_t kRanks = 2;
constexpr std::size_t kMaxDescriptors = 3;

// Of a thread of this process; zeros and 'S' where the kernel does not say.
struct ThreadTime {
  char state = 'S';
  std::chrono::nanoseconds ran{0}, waited{0};  // for a processor
};

ThreadTime time_of(pid_t thread) {
  const std::string folder = "/proc/self/task/" + std::to_string(thread);
  ThreadTime time;
  std::int64_t ran = 0, waited = 0;
  if (std::ifstream(folder + "/schedstat") >> ran >> waited) {
    time.ran = std::chrono::nanoseconds(ran);
    time.waited = std::chrono::nanoseconds(waited);
  }
  std::string line;
  if (std::getline(std::ifstream(folder + "/stat"), line) && line.rfind(") ") != std::string::npos) {
    time.state = line[line.rfind(") ") + 2];
  }
  return time;
}

constexpr std::chrono::milliseconds kTick{100};

// Judges a thread by the time in which it could have done its work: when it slept, or had a processor. What it waited for a
// processor or a disk, and what this process was stopped, is the machine's.
class Patience {
 public:
  explicit Patience(pid_t thread) : thread_(thread) {}
  /// After a tick in which it was waited for in vain. The first has nothing to be compared with and costs nothing.
  bool is_over() {
    const ThreadTime now = time_of(thread_);
    const auto zero = std::chrono::nanoseconds(0);
    if (ticks_++ > 0) left_ -= now.state == 'S' ? std::max(zero, kTick - (now.waited - before_.waited)) : now.ran - before_.ran;
    before_ = now;
    return left_ <= zero;
  }

 private:
  pid_t thread_;
  ThreadTime before_;
  std::uint64_t ticks_ = 0;
  std::chrono::nanoseconds left_ = std::chrono::seconds(30);
};

class Owner {
 public:
  Owner() {
    directory_ = make_directory();
    ::setenv("LMCN_RUNTIME_DIR", directory_.c_str(), 1);
    auto arena = HostArena::create({.bytes = kArenaBytes, .populate_threads = 0});
    require(arena.ok(), arena.status().to_string());
    arena_ = std::move(*arena);
    auto owner = RendezvousOwner::listen("fuzz", arena_->memfd(), {kArenaBytes, kRankBytes, kRanks, 1}, [this](std::uint32_t) {
      std::lock_guard lock(mutex_);
      thread_ = ::gettid();
      ++gone_;
      changed_.notify_all();
    });
    require(owner.ok(), owner.status().to_string());
    owner_ = std::move(*owner);
    const Status first = RendezvousClient::attach("fuzz", 0, kRankBytes, std::chrono::hours(1)).status();
    require(first.ok(), first.to_string());
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return gone_ == 1; });
  }
  ~Owner() {
    owner_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
  UniqueFd connect() const {
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    const wire::Address address = wire::address_of(owner_->path());
    require(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) == 0, "connect to the owner");
    return socket;
  }
  int memfd() const { return arena_->memfd(); }
  std::uint64_t gone() {
    std::lock_guard lock(mutex_);
    return gone_;
  }
  void wait_gone(std::uint64_t count) {
    std::unique_lock lock(mutex_);
    Patience patience(thread_);
    while (!changed_.wait_for(lock, kTick, [&] { return gone_ >= count; })) {
      require(!patience.is_over(), "the owner does not notice the end");
    }
  }
  void wait_answer(int socket) {
    Patience patience(thread());
    pollfd event{socket, POLLIN, 0};
    for (;;) {
      const int ready = ::poll(&event, 1, static_cast<int>(kTick.count()));
      if (ready > 0) return;
      if (ready < 0) require(errno == EINTR, "poll");  // libFuzzer's alarm
      if (ready == 0) require(!patience.is_over(), "the owner neither answers nor closes");
    }
  }
  pid_t thread() {
    std::lock_guard lock(mutex_);
    return thread_;
  }
  std::uint32_t attached() const { return owner_->attached_ranks(); }

 private:
  std::string directory_;
  std::unique_ptr<HostArena> arena_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t gone_ = 0;
  pid_t thread_ = 0;  // the owner's
  std::unique_ptr<RendezvousOwner> owner_;
};

Owner& owner() {
  static Owner one;
  return one;
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  DIR* const folder = ::opendir("/proc/self/fd");
  require(folder != nullptr, "opendir /proc/self/fd");
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count;
}

bool send(int socket, const Bytes& bytes, std::size_t descriptors) {
  iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (descriptors > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors * sizeof(int));
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors * sizeof(int));
    const int memfd = owner().memfd();
    for (std::size_t i = 0; i < descriptors; ++i) std::memcpy(CMSG_DATA(header) + i * sizeof(int), &memfd, sizeof memfd);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

struct Pair {
  UniqueFd near, far;
};

Pair socket_pair() {
  int ends[2];
  require(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
  Pair pair;
  pair.near.reset(ends[0]);
  pair.far.reset(ends[1]);
  return pair;
}

bool is_hello(const Bytes& message, wire::Hello& hello) {
  if (message.size() != sizeof hello) return false;
  std::memcpy(&hello, message.data(), sizeof hello);
  return hello.magic == wire::kHelloMagic;
}

void receive_a_hello(const Bytes& message, std::size_t descriptors) {
  const Pair pair = socket_pair();
  require(send(pair.near.get(), message, descriptors), "sendmsg");
  wire::Hello hello, sent;
  const Status status = wire::receive_hello(pair.far.get(), hello);
  require(status.ok() == is_hello(message, sent), "hello: " + status.to_string());
  if (status.ok()) require(std::memcmp(&hello, &sent, sizeof hello) == 0, "another hello than was sent");
}

void receive_a_goodbye(const Bytes& message, std::size_t descriptors) {
  const Pair pair = socket_pair();
  require(send(pair.near.get(), message, descriptors), "sendmsg");
  const wire::Goodbye goodbye;
  const bool right = message.size() == sizeof goodbye && std::memcmp(&goodbye, message.data(), sizeof goodbye) == 0;
  const Status status = wire::receive_goodbye(pair.far.get());
  require(status.ok() == right, "goodbye: " + status.to_string());
}

void receive_a_reply(const Bytes& message, std::size_t descriptors) {
  const Pair pair = socket_pair();
  require(send(pair.near.get(), message, descriptors), "sendmsg");
  wire::Reply reply;
  UniqueFd memfd;
  const Status status = wire::receive_reply(pair.far.get(), reply, memfd);
  if (!status.ok()) {
    require(status.code() == Code::kInvalidArgument || status.code() == Code::kUnavailable, "reply: " + status.to_string());
    return;
  }
  require(message.size() == sizeof reply && std::memcmp(&reply, message.data(), sizeof reply) == 0, "another reply than was sent");
  require(!memfd.valid() || descriptors == 1, "an arena from a message with " + std::to_string(descriptors) + " descriptors");
  const Status told = wire::status_of(reply);
  require(told.ok() == (reply.code == 0), "a refusal that says ok");
  require(told.message().size() <= sizeof reply.text, "the text is longer than its field");
}

enum class Answer { kArena, kNone, kTooLate };

Answer ask_once(const Bytes& message, std::size_t descriptors) {
  const auto start = std::chrono::steady_clock::now();
  const UniqueFd socket = owner().connect();
  const bool sent = send(socket.get(), message, descriptors);
  const bool in_time = std::chrono::steady_clock::now() - start < wire::kHelloDeadline;
  require(sent || !in_time, "sendmsg");
  owner().wait_answer(socket.get());
  wire::Reply reply;
  UniqueFd memfd;
  const Status status = wire::receive_reply(socket.get(), reply, memfd);
  if (!status.ok()) {
    require(status.code() == Code::kUnavailable, "answer: " + status.to_string());
    if (!in_time) return Answer::kTooLate;
    // An empty message looks like the end of the connection; it is one.
    require(message.empty(), "no answer: " + status.to_string());
    return Answer::kNone;
  }
  const bool attached = wire::status_of(reply).ok();
  require(memfd.valid() == attached, "an arena without leave, or leave without an arena");
  if (attached) wire::send_goodbye(socket.get());  // the rank's process lives on
  return attached ? Answer::kArena : Answer::kNone;
}

void ask_owner(const Bytes& message, std::size_t descriptors) {
  Owner& owner = ::owner();
  const std::uint64_t gone = owner.gone();
  wire::Hello hello;
  const bool valid = is_hello(message, hello) && hello.version == wire::kVersion && hello.rank < kRanks &&
                     hello.rank_bytes == kRankBytes && hello.replicated == 0;
  Answer answer = Answer::kTooLate;
  while (answer == Answer::kTooLate) answer = ask_once(message, descriptors);
  const bool attached = answer == Answer::kArena;
  require(attached == valid, valid ? "a valid hello was refused" : "an invalid hello was let in");
  if (attached) owner.wait_gone(gone + 1);
  require(owner.attached() == 0, "a rank stays attached");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  const std::size_t descriptors = input.take<std::uint8_t>() % (kMaxDescriptors + 1);
  const Bytes message = input.take_bytes(4096);
  owner();
  if ((flags & 2) != 0) {
    ask_owner(message, descriptors);
    return 0;
  }
  const std::size_t before = open_descriptors();
  if ((flags & 1) != 0) {
    receive_a_reply(message, descriptors);
  } else if ((flags & 4) != 0) {
    receive_a_goodbye(message, descriptors);
  } else {
    receive_a_hello(message, descriptors);
  }
  // Fewer: the owner's thread closed what was left of the last connection.
  require(open_descriptors() <= before, "descriptors stay open");
  return 0;
}
