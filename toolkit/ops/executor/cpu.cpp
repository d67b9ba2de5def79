// A captured graph as one native call: a list of kernels and where their arguments lie, run without Python in between.
//
// Values of a run are registers. An argument is a constant (a parameter, a number), a register, or a list of tensors of
// either sort. Kernels are called below autograd, for the graph's device; what is no kernel of the device's own is found
// by torch's dispatcher as always. A register is emptied by its last reader. The threads stay with the run from its first
// kernel to its last (team.h), where asked to.
#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include "pairs.h"
#include "threads.h"

namespace toolkit::executor {

using at::Tensor;
using c10::IValue;

struct Argument {
  enum Kind { kConstant, kRegister, kTensors, kOptionalTensors } kind = kConstant;
  IValue constant;
  int64_t at = -1;
  std::vector<Argument> items;
};

struct Node {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<std::vector<int64_t>> results;  // of each return the registers that it fills, -1 for none
  std::vector<bool> is_list;                  // whether the return is a list of tensors
  std::vector<int64_t> dying;                 // registers that nobody reads after this node
};

// The value as the schema has it. Python's whole numbers may be meant as floats, its empty lists as lists of anything; a
// number in the place of a tensor is one that gives its dtype up to the other operand.
IValue as_type(const IValue& value, c10::TypePtr type) {
  if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  if (value.isInt() && type->kind() == c10::TypeKind::FloatType) return static_cast<double>(value.toInt());
  if (const auto list = type->cast<c10::ListType>(); list && value.isIntList() && value.toIntList().empty())
    return c10::impl::GenericList(list->getElementType());
  if (!value.isScalar() || type->kind() != c10::TypeKind::TensorType) return value;
  Tensor number = c10::scalar_to_tensor(value.toScalar());
  number.unsafeGetTensorImpl()->set_wrapped_number(true);
  return number;
}

class Program : public torch::CustomClassHolder {
 public:
  Program(std::vector<int64_t> inputs, int64_t output, int64_t registers)
      : inputs_(std::move(inputs)), output_(output), registers_(registers) {}

  // Begins a node; its arguments follow in the schema's order.
  void add_node(const std::string& name, const std::string& overload) {
    nodes_.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, {}, {}});
  }

  void add_constant(const IValue& value) {
    const auto& type = schema_argument().type();
    const IValue typed = as_type(value, type);
    TORCH_CHECK(typed.type()->isSubtypeOf(*type), "executor: argument ", schema_argument().name(), " of ", name(),
                " must be ", type->str(), ", got ", typed.type()->str(), ".");
    append().constant = typed;
  }

  // A number, or a dtype, layout or memory format by its number.
  void add_int(int64_t value) { add_constant(value); }
  void add_ints(const std::vector<int64_t>& values) { add_constant(values); }

  void add_default() {
    const auto& value = schema_argument().default_value();
    TORCH_CHECK(value.has_value(), "executor: argument ", schema_argument().name(), " of ", name(),
                " must be given, got nothing.");
    append().constant = *value;
  }

  void add_register(int64_t at) {
    Argument& added = append();
    added.kind = Argument::kRegister;
    added.at = at;
  }

  // A list of tensors: registers, and constants where the register is -1.
  void add_tensors(const std::vector<int64_t>& registers, const std::vector<std::optional<Tensor>>& constants) {
    const auto type = schema_argument().type()->cast<c10::ListType>();
    TORCH_CHECK(type, "executor: argument ", schema_argument().name(), " of ", name(), " must be a list.");
    Argument& added = append();
    const bool optional = type->getElementType()->kind() == c10::TypeKind::OptionalType;
    added.kind = optional ? Argument::kOptionalTensors : Argument::kTensors;
    bool fixed = true;
    for (size_t i = 0; i < registers.size(); ++i) {
      Argument item;
      item.at = registers[i];
      if (item.at >= 0) {
        item.kind = Argument::kRegister;
        fixed = false;
      } else if (constants[i]) {
        item.constant = *constants[i];
      }
      added.items.push_back(std::move(item));
    }
    if (!fixed) return;
    added.constant = list_of(added, {});  // weights of a group: one list for all runs
    added.kind = Argument::kConstant;
  }

  // Registers of the next return; one, where it is no list.
  void add_result(const std::vector<int64_t>& registers, bool is_list) {
    nodes_.back().results.push_back(registers);
    nodes_.back().is_list.push_back(is_list);
  }

  // Ends a node, whose registers `dying` nobody reads any more, and checks it against its schema.
  void end_node(const std::vector<int64_t>& dying) {
    Node& node = nodes_.back();
    node.dying = dying;
    const auto& schema = node.op.schema();
    TORCH_CHECK(node.arguments.size() == schema.arguments().size(), "executor: ", name(), " must have ",
                schema.arguments().size(), " arguments, got ", node.arguments.size(), ".");
    TORCH_CHECK(node.results.empty() || node.results.size() == schema.returns().size(), "executor: ", name(),
                " must have ", schema.returns().size(), " results, got ", node.results.size(), ".");
  }

  // With `own_threads` kernels share out work to the step's team, else to torch's threads.
  Tensor run(const std::vector<Tensor>& inputs, bool own_threads) const {
    TORCH_CHECK(inputs.size() == inputs_.size(), "executor: inputs must be ", inputs_.size(), " tensors, got ",
                inputs.size(), ".");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::optional<threads::Team::Scope> team;
    if (own_threads) team.emplace();
    const bool profiled = at::hasCallbacks();
    std::vector<IValue> registers(registers_);
    for (size_t i = 0; i < inputs.size(); ++i) registers[inputs_[i]] = inputs[i];
    torch::jit::Stack stack;
    for (const Node& node : nodes_) {
      stack.clear();
      for (const Argument& argument : node.arguments) stack.push_back(value_of(argument, registers));
      if (profiled)
        node.op.callBoxed(&stack);
      else
        node.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
      for (size_t i = 0; i < node.results.size(); ++i) keep(node.results[i], node.is_list[i], stack[i], registers);
      for (const int64_t at : node.dying) registers[at] = IValue();
    }
    return registers[output_].toTensor();
  }

 private:
  static IValue value_of(const Argument& argument, const std::vector<IValue>& registers) {
    switch (argument.kind) {
      case Argument::kConstant: return argument.constant;
      case Argument::kRegister: return registers[argument.at];
      default: return list_of(argument, registers);
    }
  }

  static IValue list_of(const Argument& argument, const std::vector<IValue>& registers) {
    if (argument.kind == Argument::kTensors) {
      c10::List<Tensor> list;
      list.reserve(argument.items.size());
      for (const Argument& item : argument.items) list.push_back(value_of(item, registers).toTensor());
      return list;
    }
    c10::List<std::optional<Tensor>> list;
    list.reserve(argument.items.size());
    for (const Argument& item : argument.items) list.push_back(value_of(item, registers).toOptional<Tensor>());
    return list;
  }

  static void keep(const std::vector<int64_t>& to, bool is_list, IValue& result, std::vector<IValue>& registers) {
    if (!is_list) {
      if (to[0] >= 0) registers[to[0]] = std::move(result);
      return;
    }
    const auto list = result.toTensorList();
    TORCH_CHECK(list.size() == to.size(), "executor: a list of ", to.size(), " results was expected, got ",
                list.size(), ".");
    for (size_t i = 0; i < to.size(); ++i)
      if (to[i] >= 0) registers[to[i]] = list.get(i);
  }

  Argument& append() { return nodes_.back().arguments.emplace_back(); }
  const std::string& name() const { return nodes_.back().op.schema().name(); }
  const c10::Argument& schema_argument() const {
    const auto& arguments = nodes_.back().op.schema().arguments();
    TORCH_CHECK(nodes_.back().arguments.size() < arguments.size(), "executor: ", name(), " must have ",
                arguments.size(), " arguments, got more.");
    return arguments[nodes_.back().arguments.size()];
  }

  std::vector<int64_t> inputs_;
  int64_t output_, registers_;
  std::vector<Node> nodes_;
};

// Kernels of the calling thread share out work to the step's team for as long as this lives.
class StepThreads : public torch::CustomClassHolder {
  threads::Team::Scope team_;
};

TORCH_LIBRARY(toolkit_native, m) {
  m.def("multiplies_pairs() -> bool", [] { return gemm::has_dot_products(); });
  m.class_<StepThreads>("StepThreads").def(torch::init<>());
  m.class_<Program>("Program")
      .def(torch::init<std::vector<int64_t>, int64_t, int64_t>())
      .def("add_node", &Program::add_node)
      .def("add_constant", &Program::add_constant)
      .def("add_int", &Program::add_int)
      .def("add_ints", &Program::add_ints)
      .def("add_default", &Program::add_default)
      .def("add_register", &Program::add_register)
      .def("add_tensors", &Program::add_tensors)
      .def("add_result", &Program::add_result)
      .def("end_node", &Program::end_node)
      .def("run", &Program::run);
}

}  // namespace toolkit::executor
