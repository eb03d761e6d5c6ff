// PTX text as data: entries, declarations, instructions with their operands, not yet bound to an
// implementation.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace sim {

enum class RegClass : u8 { kPred, k16, k32, k64 };

struct Register {
  RegClass cls;
  std::string name;
};

enum class ArgKind : u8 { kNone, kReg, kInt, kF32, kF64, kSymbol, kSpecial, kMem, kVector, kSink };

// One operand. kMem: base (first of `list`) plus `value` bytes; further elements of `list` are a tensor's
// coordinates.
struct Arg {
  ArgKind kind = ArgKind::kNone;
  u32 reg = kNone;
  u64 value = 0;
  bool negated = false;  // !p
  std::string name;      // symbol, label, special register
  std::vector<Arg> list;
};

struct Inst {
  std::string text;                // "setp.ne.b32"
  std::vector<std::string> parts;  // {"setp", "ne", "b32"}
  std::vector<Arg> args;           // p|q is two consecutive arguments
  u32 guard = kNone;
  bool guard_negated = false;
  int line = 0;
  int file = 0, source_line = 0;
  int scope = 0;
  bool has(const char* part) const;
  // Last part: the type in most instructions.
  const std::string& type() const { return parts.back(); }
};

struct Variable {
  std::string space;  // shared, global, const, local, param
  u64 align = 1, size = 0;
  bool external = false;
  u64 address = 0;
  std::vector<u8> init;
};

struct Entry {
  std::string name;
  std::vector<std::string> param_names;
  std::vector<Variable> params;
  std::vector<Inst> insts;
  std::vector<Register> registers;
  std::map<std::string, Variable> variables;                          // of function scope: shared, local
  std::unordered_map<std::string, u32> labels;                        // "scope:name" -> instruction
  std::unordered_map<std::string, std::vector<std::string>> targets;  // .branchtargets lists
  std::vector<int> scope_parent;
  u32 max_threads = 0;
  u32 max_registers = 0;
  u32 find_label(const std::string& name, int scope) const;
};

struct Module {
  std::map<std::string, Entry> entries;
  std::map<std::string, Variable> variables;  // of module scope
  std::map<int, std::string> files;
};

// Adds one module's text to `module`. Only the named entry's body is kept, if `wanted` is not empty.
void parse_ptx(const std::string& text, const std::string& wanted, Module& module);

}  // namespace sim
