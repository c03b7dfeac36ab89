#include "memory/numa.hpp"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <set>
#include <string>

namespace lmcn {
namespace {

constexpr int kMaxNodes = 1024;  // the most a kernel can be built for
constexpr std::size_t kWordBits = 8 * sizeof(unsigned long);
constexpr std::uint64_t kSmallPagesOfHuge = 512;

class NodeMask {
 public:
  void add(int node) { words_[word(node)] |= bit(node); }
  bool has(int node) const { return node >= 0 && node < kMaxNodes && (words_[word(node)] & bit(node)) != 0; }
  unsigned long* data() { return words_.data(); }
  /// "0-3,8"
  std::string to_string() const {
    std::string text;
    for (int first = 0; first < kMaxNodes; ++first) {
      if (!has(first)) continue;
      int last = first;
      while (has(last + 1)) ++last;
      if (!text.empty()) text += ',';
      text += std::to_string(first);
      if (last > first) text.append(1, '-').append(std::to_string(last));
      first = last;
    }
    return text;
  }

 private:
  static std::size_t word(int node) { return static_cast<std::size_t>(node) / kWordBits; }
  static unsigned long bit(int node) { return 1ul << (static_cast<std::size_t>(node) % kWordBits); }
  std::array<unsigned long, kMaxNodes / kWordBits> words_{};
};

// Distinguishes "cannot be done here" from a failure of this one call.
Status numa_error(int error, const std::string& what) {
  const bool refused = error == ENOSYS || error == EPERM;
  return Status::from_errno(error, "numa_nodes: " + what + (refused ? " (a container needs CAP_SYS_NICE for it)" : ""),
                            refused ? Code::kUnavailable : Code::kIoError);
}

}  // namespace

Status check_numa_nodes(std::span<const int> nodes) {
  if (nodes.empty()) return {};
  NodeMask allowed;
  // The kernel reads one bit less than it is told.
  if (::syscall(SYS_get_mempolicy, nullptr, allowed.data(), kMaxNodes + 1ul, nullptr, MPOL_F_MEMS_ALLOWED) != 0) {
    return numa_error(errno, "get_mempolicy");
  }
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (allowed.has(nodes[i])) continue;
    return {Code::kInvalidArgument, "numa_nodes[" + std::to_string(i) + "] is " + std::to_string(nodes[i]) +
                                        ", must be a node with memory that this process may use: " + allowed.to_string()};
  }
  return {};
}

Status place_on_numa_nodes(std::byte* base, std::uint64_t bytes, std::span<const int> nodes) {
  if (nodes.empty()) return {};
  LMCN_RETURN_IF_ERROR(check_numa_nodes(nodes));
  const std::set<int> distinct(nodes.begin(), nodes.end());
  NodeMask mask;
  for (const int node : distinct) mask.add(node);
  const int mode = distinct.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
  if (::syscall(SYS_mbind, base, bytes, mode, mask.data(), kMaxNodes + 1ul, 0u) != 0)
    return numa_error(errno, "mbind of the host arena");
  return {};
}

std::uint64_t page_that_places_huge_page(std::uint64_t huge_page, std::uint64_t nodes) noexcept {
  if (nodes < 2) return 0;
  // (huge_page * 512 + result) % nodes == huge_page % nodes
  const std::uint64_t first = huge_page % nodes * (kSmallPagesOfHuge % nodes) % nodes;
  return (huge_page % nodes + nodes - first) % nodes;
}

}  // namespace lmcn
