// The messages of the arena's socket. Input: a byte of flags, a number of descriptors (0..3) that come along, then one message.
//   0  a hello, received from a socket pair
//   1  a reply, received from a socket pair
//   2  a hello to a real owner; a valid one, and no other, gets the arena
#include <dirent.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <mutex>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

constexpr std::uint64_t kArenaBytes = 1 << 20;
constexpr std::uint64_t kRankBytes = 4096;
constexpr std::uint32_t kRanks = 2;
constexpr std::size_t kMaxDescriptors = 3;

class Owner {
 public:
  Owner() {
    directory_ = make_directory();
    ::setenv("LMCN_RUNTIME_DIR", directory_.c_str(), 1);
    memfd_.reset(::memfd_create("lmcn_fuzz", MFD_CLOEXEC));
    require(memfd_.valid() && ::ftruncate(memfd_.get(), kArenaBytes) == 0, "memfd");
    auto owner = RendezvousOwner::listen("fuzz", memfd_.get(), {kArenaBytes, kRankBytes, kRanks, 1}, [this](std::uint32_t) {
      std::lock_guard lock(mutex_);
      ++gone_;
      changed_.notify_all();
    });
    require(owner.ok(), owner.status().to_string());
    owner_ = std::move(*owner);
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
  int memfd() const { return memfd_.get(); }
  std::uint64_t gone() {
    std::lock_guard lock(mutex_);
    return gone_;
  }
  void wait_gone(std::uint64_t count) {
    std::unique_lock lock(mutex_);
    require(changed_.wait_for(lock, std::chrono::seconds(10), [&] { return gone_ >= count; }), "the owner does not notice the end");
  }
  std::uint32_t attached() const { return owner_->attached_ranks(); }

 private:
  std::string directory_;
  UniqueFd memfd_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t gone_ = 0;
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

void send(int socket, const Bytes& bytes, std::size_t descriptors) {
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
  require(::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()), "sendmsg");
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
  send(pair.near.get(), message, descriptors);
  wire::Hello hello, sent;
  const Status status = wire::receive_hello(pair.far.get(), hello);
  require(status.ok() == is_hello(message, sent), "hello: " + status.to_string());
  if (status.ok()) require(std::memcmp(&hello, &sent, sizeof hello) == 0, "another hello than was sent");
}

void receive_a_reply(const Bytes& message, std::size_t descriptors) {
  const Pair pair = socket_pair();
  send(pair.near.get(), message, descriptors);
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

void ask_owner(const Bytes& message, std::size_t descriptors) {
  Owner& owner = ::owner();
  const std::uint64_t gone = owner.gone();
  wire::Hello hello;
  const bool valid =
      is_hello(message, hello) && hello.version == wire::kVersion && hello.rank < kRanks && hello.rank_bytes == kRankBytes;
  bool attached = false;
  {
    const UniqueFd socket = owner.connect();
    send(socket.get(), message, descriptors);
    pollfd event{socket.get(), POLLIN, 0};
    require(::poll(&event, 1, 10'000) == 1, "the owner neither answers nor closes");
    wire::Reply reply;
    UniqueFd memfd;
    const Status status = wire::receive_reply(socket.get(), reply, memfd);
    if (status.ok()) {
      attached = wire::status_of(reply).ok();
      require(memfd.valid() == attached, "an arena without leave, or leave without an arena");
    } else {
      // An empty message looks like the end of the connection; it is one.
      require(message.empty() && status.code() == Code::kUnavailable, "answer: " + status.to_string());
    }
  }
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
  } else {
    receive_a_hello(message, descriptors);
  }
  // Fewer: the owner's thread closed what was left of the last connection.
  require(open_descriptors() <= before, "descriptors stay open");
  return 0;
}
