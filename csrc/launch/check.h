// Errors of the host layer. Messages name the argument, what was got, and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vsa {

// A bad argument: ValueError in Python.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A failed call of the driver or the runtime: RuntimeError in Python.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class... Parts>
void check_argument(bool condition, const Parts&... parts) {
  if (!condition) throw ArgumentError(text(parts...));
}

}  // namespace vsa
