// On which NUMA nodes memory lies: raw system calls, no libnuma.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "lmcn/status.hpp"

namespace lmcn {

/// kInvalidArgument names the first of `nodes` that does not exist or is not allowed to this process (cpuset), and those that are.
/// kUnavailable: the kernel, or a container's seccomp profile, refuses the question. Ok for no nodes, whatever the kernel.
Status check_numa_nodes(std::span<const int> nodes);

/// Where pages of [base, base + bytes), a shared mapping of a memfd, are to come from, for every process that touches them first:
/// the policy is the memfd's. Pages that are there already stay.
/// One node: MPOL_PREFERRED and not MPOL_BIND, because a full node must cost speed and never the process: a fault that may only be
/// served there ends in the OOM killer, or in SIGBUS with hugetlb pages, which are reserved without regard to nodes.
/// Several: MPOL_INTERLEAVE, page by page, which falls back likewise. None: nothing is set.
Status place_on_numa_nodes(std::byte* base, std::uint64_t bytes, std::span<const int> nodes);

/// Interleaving goes by 4 KiB pages, and a huge page is collapsed on the node of the small pages in it: which small page of huge
/// page `huge_page` must be there before, so that huge pages take turns too (the first of each would lie on one and the same node
/// when the number of nodes divides 512). `nodes`: how many; 0 or 1 give page 0.
std::uint64_t page_that_places_huge_page(std::uint64_t huge_page, std::uint64_t nodes) noexcept;

}  // namespace lmcn
