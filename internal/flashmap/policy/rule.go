package policy

import (
	"fmt"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Limits of a rule: its text, how deep it is nested, and what one evaluation may cost in the
// units of CEL, about one for each operator.
const (
	maxRuleText  = 1024
	maxRuleDepth = 32
	maxRuleCost  = 1000
)

// RuleError says what is wrong with a rule, and where.
type RuleError struct {
	Name   string // of the parameter
	Line   int    // from 1
	Column int    // from 1
	Reason string
}

// Error implements error.
func (e *RuleError) Error() string {
	return fmt.Sprintf("%s: line %d, column %d: %s", e.Name, e.Line, e.Column, e.Reason)
}

// rules are the compiled rules of a pattern.
type rules struct{ promote, demote *rule }

// rule is a compiled expression.
type rule struct {
	name    string
	text    string
	program cel.Program
}

// environment declares what a rule may speak of.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.ClearMacros(),
		cel.CrossTypeNumericComparisons(true),
		cel.ParserExpressionSizeLimit(maxRuleText),
		cel.ParserRecursionLimit(maxRuleDepth),
		cel.Variable("reads", cel.DoubleType),
		cel.Variable("writes", cel.DoubleType),
		cel.Variable("sequential", cel.DoubleType),
		cel.Variable("random", cel.DoubleType),
		cel.Variable("size", cel.DoubleType),
		cel.Variable("age", cel.DurationType),
		cel.Variable("references", cel.IntType),
		cel.Variable("pinned", cel.BoolType),
		cel.Variable("on_flash", cel.BoolType),
	)
})

// compileRule compiles the text of a rule; nil without one. Errors are of type *RuleError.
func compileRule(name, text string) (*rule, error) {
	if text == "" {
		return nil, nil
	}
	if len(text) > maxRuleText {
		return nil, &RuleError{name, 1, maxRuleText + 1, fmt.Sprintf("the rule has %d bytes, at most %d are possible", len(text), maxRuleText)}
	}
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ast, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		first := issues.Errors()[0]
		return nil, &RuleError{name, max(1, first.Location.Line()), max(0, first.Location.Column()) + 1, first.Message}
	}
	if typ := ast.OutputType(); !typ.IsExactType(cel.BoolType) {
		return nil, &RuleError{name, 1, 1, fmt.Sprintf("the rule is of type %s; it must be true or false", typ)}
	}
	program, err := env.Program(ast, cel.CostLimit(maxRuleCost), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		// What is constant is computed by now, and cannot be.
		return nil, &RuleError{name, 1, 1, err.Error()}
	}
	return &rule{name, text, program}, nil
}

// Attributes are what is known of a data set beside its use.
type Attributes struct {
	References int // how many references what lies there has
}

// facts are what a rule speaks of.
type facts struct {
	stat    collect.Stat
	attr    Attributes
	pinned  bool
	onFlash bool
}

// ResolveName implements cel.Activation.
func (f *facts) ResolveName(name string) (any, bool) {
	switch name {
	case "reads":
		return types.Double(f.stat.Reads), true
	case "writes":
		return types.Double(f.stat.Writes), true
	case "sequential":
		return types.Double(f.stat.Runs), true
	case "random":
		return types.Double(f.stat.Random()), true
	case "size":
		return types.Double(f.stat.Size), true
	case "age":
		return types.Duration{Duration: min(f.stat.Age, maxRuleAge)}, true
	case "references":
		return types.Int(f.attr.References), true
	case "pinned":
		return types.Bool(f.pinned), true
	case "on_flash":
		return types.Bool(f.onFlash), true
	}
	return nil, false
}

// maxRuleAge is the age of what was never seen: large, and still a number to add to.
const maxRuleAge = 100 * 365 * 24 * time.Hour

// Parent implements cel.Activation.
func (f *facts) Parent() cel.Activation { return nil }

// holds evaluates the rule. An error says why it could not be.
func (r *rule) holds(f *facts) (bool, error) {
	out, _, err := r.program.Eval(f)
	if err != nil {
		return false, fmt.Errorf("%s: %w", r.name, err)
	}
	return out.Equal(types.True) == ref.Val(types.True), nil
}
