// PTX ISA 5 "State Spaces, Types, and Variables", 10 "Directives", 6.4 "Using Addresses, Arrays, and
// Vectors".
#include <cctype>
#include <sstream>

#include "lexer.h"
#include "ptx.h"

namespace sim {

bool Inst::has(const char* part) const {
  for (const std::string& candidate : parts) {
    if (candidate == part) return true;
  }
  return false;
}

u32 Entry::find_label(const std::string& name, int scope) const {
  for (; scope >= 0; scope = scope_parent[scope]) {
    auto found = labels.find(std::to_string(scope) + ":" + name);
    if (found != labels.end()) return found->second;
  }
  fail("unsupported", "no label " + name);
}

namespace {

int type_bytes(const std::string& type) {
  if (type == ".pred") return 0;
  size_t digit = type.find_first_of("0123456789");
  if (type.find("x2") != std::string::npos) return 4;
  if (digit == std::string::npos) fail("unsupported", "type " + type);
  return std::stoi(type.substr(digit)) / 8;
}

RegClass register_class(const std::string& type) {
  if (type == ".pred") return RegClass::kPred;
  int bytes = type_bytes(type);
  if (bytes > 8) fail("unsupported", "register type " + type);
  return bytes == 8 ? RegClass::k64 : bytes == 4 ? RegClass::k32 : RegClass::k16;
}

struct RegisterRange {
  RegClass cls;
  u64 count;
};

class Parser {
 public:
  Parser(const std::string& text, const std::string& wanted, Module& module)
      : lexer_(text), wanted_(wanted), module_(module) {}
  void module();

 private:
  void skip_statement();
  Variable variable(const std::string& space, std::string& name);
  void initialiser(Variable& variable, int element_bytes);
  void entry();
  void params(Entry& entry);
  void body(Entry& entry);
  void directive(const std::string& word);
  void registers();
  void location();
  void instruction(const std::string& opcode);
  Arg argument();
  Arg memory();
  Arg vector();
  Arg name(const std::string& text);
  u32 find_register(const std::string& text);

  Lexer lexer_;
  std::string wanted_;
  Module& module_;
  Entry* entry_ = nullptr;
  int scope_ = 0, file_ = 0, source_line_ = 0;
  std::vector<std::unordered_map<std::string, u32>> exact_;             // per scope
  std::vector<std::unordered_map<std::string, RegisterRange>> ranges_;  // per scope: %r<10>
  u32 guard_ = kNone;
  bool guard_negated_ = false;
};

void Parser::skip_statement() {
  while (lexer_.peek().kind != Token::kEnd && !lexer_.is(";") && !lexer_.is("{")) lexer_.next();
  if (lexer_.accept("{")) {
    lexer_.skip_block();
  } else {
    lexer_.accept(";");
  }
}

void Parser::initialiser(Variable& variable, int element_bytes) {
  auto push = [&variable, element_bytes](u64 value) {
    for (int i = 0; i < element_bytes; i++) variable.init.push_back(static_cast<u8>(value >> 8 * i));
  };
  bool braces = lexer_.accept("{");
  do {
    if (braces && lexer_.is("}")) break;
    if (braces && lexer_.is("{")) {
      initialiser(variable, element_bytes);
      continue;
    }
    bool negative = lexer_.accept("-");
    Token token = lexer_.next();
    if (token.kind == Token::kWord) fail("unsupported", "initialiser with an address: " + token.text);
    push(negative ? -token.value : token.value);
  } while (braces && lexer_.accept(","));
  if (braces) lexer_.expect("}");
}

// After the state space: [.align n] [.v2|.v4] .type name [dims] [= init]
Variable Parser::variable(const std::string& space, std::string& name) {
  Variable result;
  result.space = space;
  int lanes = 1, bytes = 0;
  bool aligned = false;
  while (lexer_.peek().kind == Token::kWord && lexer_.peek().text[0] == '.') {
    std::string word = lexer_.word();
    if (word == ".align") {
      result.align = lexer_.number();
      aligned = true;
    } else if (word == ".v2" || word == ".v4") {
      lanes = word[2] - '0';
    } else if (word != ".attribute" && word != ".ptr" && word != ".global" && word != ".shared" &&
               word != ".const") {
      bytes = type_bytes(word);
    }
  }
  name = lexer_.word();
  u64 count = lanes;
  while (lexer_.accept("[")) {
    count *= lexer_.is("]") ? 0 : lexer_.number();
    lexer_.expect("]");
  }
  if (!aligned) result.align = std::max(1, bytes * lanes);
  result.size = count * bytes;
  if (lexer_.accept("=")) initialiser(result, bytes);
  if (result.size == 0 && !result.init.empty()) result.size = result.init.size();
  return result;
}

void Parser::module() {
  while (lexer_.peek().kind != Token::kEnd) {
    Token token = lexer_.next();
    const std::string& word = token.text;
    if (word == ".version" || word == ".address_size") {
      lexer_.next();
      while (lexer_.is(".") || lexer_.peek().kind == Token::kNumber) lexer_.next();
    } else if (word == ".target") {
      do {
        lexer_.next();
      } while (lexer_.accept(","));
    } else if (word == ".visible" || word == ".weak" || word == ".extern" || word == ".common") {
      continue;
    } else if (word == ".entry") {
      entry();
    } else if (word == ".file") {
      u64 id = lexer_.number();
      module_.files[static_cast<int>(id)] = lexer_.next().text;
      while (lexer_.accept(",")) lexer_.next();
    } else if (word == ".shared" || word == ".global" || word == ".const") {
      std::string name;
      Variable declared = variable(word.substr(1), name);
      declared.external = declared.size == 0;
      module_.variables[name] = declared;
      lexer_.expect(";");
    } else if (word != ";") {
      skip_statement();  // .func, .section, .pragma, .alias
    }
  }
}

void Parser::params(Entry& entry) {
  if (!lexer_.accept("(")) return;
  while (lexer_.accept(".param")) {
    std::string name;
    Variable param = variable("param", name);
    if (param.size == 0) fail("unsupported", "parameter " + name + " of unknown size");
    entry.param_names.push_back(name);
    entry.params.push_back(param);
    lexer_.accept(",");
  }
  lexer_.expect(")");
}

void Parser::entry() {
  Entry entry;
  entry.name = lexer_.word();
  params(entry);
  while (!lexer_.is("{") && !lexer_.is(";")) {  // performance directives
    std::string word = lexer_.word();
    u64 product = 1;
    while (lexer_.peek().kind == Token::kNumber) {
      product *= lexer_.number();
      lexer_.accept(",");
    }
    if (word == ".maxntid" || word == ".reqntid") entry.max_threads = static_cast<u32>(product);
    if (word == ".maxnreg") entry.max_registers = static_cast<u32>(product);
  }
  if (lexer_.accept(";")) return;
  lexer_.expect("{");
  if (!wanted_.empty() && entry.name != wanted_) {
    lexer_.skip_block();
    return;
  }
  body(entry);
  module_.entries[entry.name] = std::move(entry);
}

void Parser::body(Entry& entry) {
  entry_ = &entry;
  entry.scope_parent = {-1};
  exact_.assign(1, {});
  ranges_.assign(1, {});
  scope_ = 0;
  for (int depth = 1; depth;) {
    if (lexer_.accept("{")) {
      depth++;
      entry.scope_parent.push_back(scope_);
      scope_ = static_cast<int>(entry.scope_parent.size()) - 1;
      exact_.emplace_back();
      ranges_.emplace_back();
    } else if (lexer_.accept("}")) {
      depth--;
      scope_ = entry.scope_parent[scope_];
    } else if (lexer_.accept("@")) {
      guard_negated_ = lexer_.accept("!");
      guard_ = find_register(lexer_.word());
    } else if (lexer_.peek().kind == Token::kEnd) {
      fail("unsupported", "unfinished body of " + entry.name);
    } else if (lexer_.accept(";")) {
      continue;
    } else {
      int line = lexer_.peek().line;
      std::string word = lexer_.word();
      if (lexer_.accept(":")) {
        entry.labels[std::to_string(scope_) + ":" + word] = static_cast<u32>(entry.insts.size());
        if (lexer_.is(".branchtargets")) {
          lexer_.next();
          std::vector<std::string>& list = entry.targets[word];
          do {
            list.push_back(lexer_.word());
          } while (lexer_.accept(","));
          lexer_.expect(";");
        }
      } else if (word[0] == '.') {
        directive(word);
      } else {
        entry.insts.emplace_back();
        entry.insts.back().line = line;
        instruction(word);
      }
    }
  }
  entry_ = nullptr;
}

void Parser::registers() {
  std::string type = lexer_.word();
  do {
    std::string name = lexer_.word();
    if (lexer_.accept("<")) {
      ranges_[scope_][name] = RegisterRange{register_class(type), lexer_.number()};
      lexer_.expect(">");
    } else {
      exact_[scope_][name] = static_cast<u32>(entry_->registers.size());
      entry_->registers.push_back({register_class(type), name});
    }
  } while (lexer_.accept(","));
  lexer_.expect(";");
}

// .loc file line column [, function_name label [+ offset], inlined_at file line column]
void Parser::location() {
  int line = lexer_.peek().line;
  file_ = static_cast<int>(lexer_.number());
  source_line_ = static_cast<int>(lexer_.number());
  while (lexer_.peek().line == line && lexer_.peek().kind != Token::kEnd) lexer_.next();
}

void Parser::directive(const std::string& word) {
  if (word == ".reg") {
    registers();
  } else if (word == ".loc") {
    location();
  } else if (word == ".shared" || word == ".local") {
    std::string name;
    Variable declared = variable(word.substr(1), name);
    entry_->variables[name] = declared;
    lexer_.expect(";");
  } else if (word == ".param" || word == ".pragma") {
    skip_statement();
  } else {
    fail("unsupported", "directive " + word);
  }
}

u32 Parser::find_register(const std::string& text) {
  size_t digits = text.size();
  while (digits && std::isdigit(static_cast<u8>(text[digits - 1]))) digits--;
  for (int scope = scope_; scope >= 0; scope = entry_->scope_parent[scope]) {
    auto found = exact_[scope].find(text);
    if (found != exact_[scope].end()) return found->second;
    auto range = ranges_[scope].find(text.substr(0, digits));
    if (digits < text.size() && range != ranges_[scope].end() &&
        std::stoull(text.substr(digits)) < range->second.count) {
      u32 id = static_cast<u32>(entry_->registers.size());
      entry_->registers.push_back({range->second.cls, text});
      return exact_[scope][text] = id;
    }
  }
  return kNone;
}

Arg Parser::name(const std::string& text) {
  Arg arg;
  arg.name = text;
  arg.reg = find_register(text);
  if (arg.reg != kNone) {
    arg.kind = ArgKind::kReg;
  } else if (text[0] == '%' || text == "WARP_SZ") {
    arg.kind = ArgKind::kSpecial;
  } else {
    arg.kind = ArgKind::kSymbol;
    if (lexer_.accept("+")) arg.value = lexer_.number();
  }
  return arg;
}

// [reg], [reg+8], [symbol+8], [16], [map, {x, y}], and the multicast or im2col operands' brackets alike.
Arg Parser::memory() {
  Arg arg;
  arg.kind = ArgKind::kMem;
  Arg base = argument();
  if (base.kind == ArgKind::kInt) {
    arg.value = base.value;
    base.value = 0;
  } else if (base.kind == ArgKind::kSymbol) {
    std::swap(arg.value, base.value);
  }
  arg.list.push_back(base);
  if (lexer_.accept("+")) {
    arg.value += lexer_.number();
  } else if (lexer_.accept("-")) {
    arg.value -= lexer_.number();
  }
  if (lexer_.accept(",")) {
    Arg coordinates = argument();
    for (Arg& coordinate : coordinates.list) arg.list.push_back(coordinate);
  }
  lexer_.expect("]");
  return arg;
}

Arg Parser::vector() {
  Arg arg;
  arg.kind = ArgKind::kVector;
  while (!lexer_.accept("}")) {
    arg.list.push_back(argument());
    lexer_.accept(",");
  }
  return arg;
}

Arg Parser::argument() {
  Arg arg;
  if (lexer_.accept("[")) return memory();
  if (lexer_.accept("{")) return vector();
  if (lexer_.accept("!")) {
    arg = argument();
    arg.negated = true;
    return arg;
  }
  if (lexer_.accept("_")) {
    arg.kind = ArgKind::kSink;
    return arg;
  }
  const Token& token = lexer_.peek();
  if (token.kind == Token::kWord) return name(lexer_.word());
  if (token.kind == Token::kFloat32 || token.kind == Token::kFloat64) {
    arg.kind = token.kind == Token::kFloat32 ? ArgKind::kF32 : ArgKind::kF64;
    arg.value = lexer_.next().value;
    return arg;
  }
  bool negative = lexer_.accept("-");
  if (lexer_.peek().kind == Token::kFloat32 || lexer_.peek().kind == Token::kFloat64) {
    arg = argument();
    arg.value ^= arg.kind == ArgKind::kF32 ? u64{1} << 31 : u64{1} << 63;
    return arg;
  }
  arg.kind = ArgKind::kInt;
  arg.value = lexer_.number();
  if (negative) arg.value = -arg.value;
  return arg;
}

void Parser::instruction(const std::string& opcode) {
  Inst& inst = entry_->insts.back();
  inst.text = opcode;
  std::stringstream stream(opcode);
  for (std::string part; std::getline(stream, part, '.');) inst.parts.push_back(part);
  inst.guard = guard_;
  inst.guard_negated = guard_negated_;
  guard_ = kNone;
  guard_negated_ = false;
  inst.file = file_;
  inst.source_line = source_line_;
  inst.scope = scope_;
  if (inst.parts[0] == "call") {
    while (!lexer_.accept(";")) lexer_.next();
    return;
  }
  while (!lexer_.accept(";")) {
    inst.args.push_back(argument());
    if (!lexer_.accept("|") && !lexer_.accept(",") && !lexer_.is(";")) lexer_.expect(";");
  }
}

}  // namespace

void parse_ptx(const std::string& text, const std::string& wanted, Module& module) {
  Parser(text, wanted, module).module();
}

}  // namespace sim
