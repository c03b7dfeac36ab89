// fork(): a copier stays with the process that made it. The child has none of its threads, its mutexes may be held by them for
// ever, and CUDA does not work in a child of a process that used it.
#pragma once

#include <memory>

#include "lmcn/paged_copy.hpp"

namespace lmcn {

/// `copier` for this process alone. In a forked child submit(), wait(), wait_layers() and lost() are kUnavailable, nothing else
/// does anything, and destroying it frees and joins nothing.
std::unique_ptr<PagedCopier> of_this_process(std::unique_ptr<PagedCopier> copier);

}  // namespace lmcn
