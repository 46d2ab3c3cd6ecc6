// What a caller may have to tell apart; bindings.cpp turns them into the errors of magicpig/errors.py. Any other
// std::invalid_argument becomes an ArgumentError.
#pragma once

#include <stdexcept>

namespace magicpig {

// An environment variable has a value that is not allowed: EnvironmentVariableError.
struct EnvironmentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace magicpig
