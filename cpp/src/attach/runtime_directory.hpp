// The private directory that sockets live in: see runtime_directory() in rendezvous.hpp.
#pragma once

#include <string>

#include "lmcn/status.hpp"
#include "memory/unique_fd.hpp"

namespace lmcn {

inline constexpr char kSocketSuffix[] = ".sock";

/// Descriptor of `directory` after the same checks; it is not created. kInvalidArgument names what is wrong with it.
Result<UniqueFd> open_private_directory(const std::string& directory);

}  // namespace lmcn
