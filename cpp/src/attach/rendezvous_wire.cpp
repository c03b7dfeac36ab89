#include "attach/rendezvous_wire.hpp"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace lmcn::wire {
namespace {

Status sent(ssize_t bytes, std::size_t wanted, const char* what) {
  if (bytes == static_cast<ssize_t>(wanted)) return {};
  if (bytes >= 0) return {Code::kInternal, std::string("short send of the ") + what};
  return Status::from_errno(errno, std::string("send of the ") + what, Code::kUnavailable);
}

// SEQPACKET keeps messages apart: what came is one message or its beginning (MSG_TRUNC).
Status received(ssize_t bytes, std::size_t wanted, int flags, const char* what) {
  if (bytes == 0 || (bytes < 0 && errno == ECONNRESET))
    return {Code::kUnavailable, std::string("the peer closed before its ") + what};
  if (bytes < 0) return Status::from_errno(errno, std::string("receive of the ") + what, Code::kUnavailable);
  if (bytes != static_cast<ssize_t>(wanted) || (flags & MSG_TRUNC) != 0) {
    return {Code::kInvalidArgument, std::string("not a ") + what +
                                        " of lmcache-native: " + ((flags & MSG_TRUNC) != 0 ? "more than " : "") +
                                        std::to_string(bytes) + " bytes, expected " + std::to_string(wanted)};
  }
  return {};
}

Status bad_magic(const char* what) {
  return {Code::kInvalidArgument, std::string("not a ") + what + " of lmcache-native: wrong magic"};
}

}  // namespace

Address address_of(const std::string& path) {
  Address address;
  address.sun.sun_family = AF_UNIX;
  const std::size_t length = std::min(path.size(), sizeof(address.sun.sun_path) - 1);
  std::memcpy(address.sun.sun_path, path.data(), length);
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length + 1);
  return address;
}

UniqueFd seqpacket_socket() {
  return UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

Result<ucred> peer_of(int socket) {
  ucred peer{};
  socklen_t length = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return Status::from_errno(errno, "SO_PEERCRED");
  return peer;
}

Result<UniqueFd> peer_process(int socket, pid_t pid) {
#ifdef SO_PEERPIDFD
  constexpr int kPeerPidfd = SO_PEERPIDFD;
#else
  constexpr int kPeerPidfd = 77;
#endif
  // Of the very process that connected; by its number it may be another one by now.
  int process = -1;
  socklen_t length = sizeof process;
  const auto short_of = [] { return errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS; };
  if (::getsockopt(socket, SOL_SOCKET, kPeerPidfd, &process, &length) == 0) return UniqueFd(process);
  if (!short_of() && pid > 0) {
    process = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
    if (process >= 0) return UniqueFd(process);
  }
  if (!short_of()) return UniqueFd();
  return Status::from_errno(errno, "pidfd of process " + std::to_string(pid), Code::kUnavailable);
}

bool has_ended(pid_t pid) noexcept {
  return pid > 0 && ::kill(pid, 0) != 0 && errno == ESRCH;
}

Reply refusal(const Status& why) {
  Reply reply;
  reply.code = static_cast<std::uint32_t>(why.code());
  const std::size_t length = std::min(why.message().size(), sizeof(reply.text) - 1);
  std::memcpy(reply.text, why.message().data(), length);
  return reply;
}

Status status_of(const Reply& reply) {
  if (reply.code == 0) return {};
  const bool known = reply.code <= static_cast<std::uint32_t>(Code::kInternal);
  return {known ? static_cast<Code>(reply.code) : Code::kUnavailable,
          std::string(reply.text, ::strnlen(reply.text, sizeof reply.text))};
}

Status send_hello(int socket, const Hello& hello) {
  return sent(::send(socket, &hello, sizeof hello, MSG_NOSIGNAL | MSG_DONTWAIT), sizeof hello, "hello");
}

void send_goodbye(int socket) noexcept {
  const Goodbye goodbye;
  static_cast<void>(::send(socket, &goodbye, sizeof goodbye, MSG_NOSIGNAL | MSG_DONTWAIT));
}

Status send_reply(int socket, const Reply& reply, int memfd) {
  iovec part{const_cast<Reply*>(&reply), sizeof reply};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (memfd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &memfd, sizeof memfd);
  }
  return sent(::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT), sizeof reply, "reply");
}

Status receive_hello(int socket, Hello& hello) {
  // Without room for control data, descriptors that a stranger sends along are dropped by the kernel.
  iovec part{&hello, sizeof hello};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  const ssize_t bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  LMCN_RETURN_IF_ERROR(received(bytes, sizeof hello, message.msg_flags, "hello"));
  return hello.magic == kHelloMagic ? Status{} : bad_magic("hello");
}

Status receive_goodbye(int socket) {
  Goodbye goodbye;
  goodbye.magic = 0;
  iovec part{&goodbye, sizeof goodbye};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  ssize_t bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  // The worker closed without having read our reply: that is told first, once.
  if (bytes < 0 && errno == ECONNRESET) bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  LMCN_RETURN_IF_ERROR(received(bytes, sizeof goodbye, message.msg_flags, "goodbye"));
  return goodbye.magic == kGoodbyeMagic ? Status{} : bad_magic("goodbye");
}

Status receive_reply(int socket, Reply& reply, UniqueFd& memfd) {
  iovec part{&reply, sizeof reply};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  // The peer closed without having read our hello: that is told first, once, its reply may lie behind it.
  if (bytes < 0 && errno == ECONNRESET) bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (bytes >= 0) {
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
      // The padding of one descriptor's room is room for another: whatever came is ours to close.
      const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
        UniqueFd taken(fd);
        if (count == 1) memfd = std::move(taken);
      }
    }
  }
  LMCN_RETURN_IF_ERROR(received(bytes, sizeof reply, message.msg_flags, "reply"));
  return reply.magic == kReplyMagic ? Status{} : bad_magic("reply");
}

}  // namespace lmcn::wire
