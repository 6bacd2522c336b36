package policy

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pollux-storage/pollux/internal/config"
)

// Parameter is one parameter as people see it.
type Parameter struct {
	Name    string // as in "patterns.default.min_accesses"
	Value   string // as Set takes it
	Default string
}

// patternsGroup is the group of parameters that has one more level, the type of device.
const patternsGroup = "patterns"

// Clone returns parameters that share nothing with p.
func (p *Params) Clone() Params {
	c := *p
	c.Patterns, c.Collect.Classes = maps.Clone(p.Patterns), slices.Clone(p.Collect.Classes)
	return c
}

// Parameters returns all parameters in the order of their declaration, patterns in that of
// their types, with AnyType first.
func (p *Params) Parameters() (out []Parameter) {
	def := Defaults()
	var visit func(name string, v, d reflect.Value)
	visit = func(name string, v, d reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				visit(join(name, keyOf(v.Type().Field(i))), v.Field(i), d.Field(i))
			}
		case reflect.Map:
			types := slices.SortedFunc(maps.Keys(p.Patterns), func(x, y string) int {
				return cmp.Or(cmp.Compare(order(x), order(y)), cmp.Compare(x, y))
			})
			for _, typ := range types {
				q, _ := def.pattern(typ)
				visit(join(name, typ), reflect.ValueOf(p.Patterns[typ]), reflect.ValueOf(q))
			}
		default:
			out = append(out, Parameter{name, text(v), text(d)})
		}
	}
	visit("", reflect.ValueOf(*p), reflect.ValueOf(def))
	return out
}

// order puts AnyType before the types that have a name.
func order(typ string) int {
	if typ == AnyType {
		return 0
	}
	return 1
}

// keyOf is the name of a field among those of its struct.
func keyOf(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	return name
}

// text writes a value as Set takes it.
func text(v reflect.Value) string {
	if v.Kind() != reflect.Slice {
		return fmt.Sprint(v.Interface())
	}
	var all []string
	for i := range v.Len() {
		all = append(all, fmt.Sprint(v.Index(i).Interface()))
	}
	return strings.Join(all, ",")
}

// FullName returns the whole name of a parameter: those of patterns may be given without
// "patterns.", and the type of device, and are those of the given type then, AnyType if it is
// empty. With a type all others are errors.
func FullName(name, typ string) (string, error) {
	if _, ok := fieldOf(reflect.ValueOf(&Pattern{}).Elem(), name); ok {
		return join(join(patternsGroup, cmp.Or(typ, AnyType)), name), nil
	}
	if of, _, ok := splitPattern(name); typ != "" && (!ok || of != typ) {
		return "", fmt.Errorf("%s: it is no parameter of the class of devices %s", name, typ)
	}
	return name, nil
}

// splitPattern tells the type of device and the parameter of the name of a pattern's
// parameter, or of a pattern, whose field is empty.
func splitPattern(name string) (typ, field string, ok bool) {
	rest, ok := strings.CutPrefix(name, patternsGroup+".")
	if !ok {
		return "", "", false
	}
	// A type may have dots in its name.
	if i := strings.LastIndexByte(rest, '.'); i >= 0 {
		if _, is := fieldOf(reflect.ValueOf(&Pattern{}).Elem(), rest[i+1:]); is {
			return rest[:i], rest[i+1:], true
		}
	}
	return rest, "", true
}

// fieldOf returns a field of a struct by its name.
func fieldOf(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if keyOf(v.Type().Field(i)) == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// names returns what a struct has, for the error of what it has not.
func names(v reflect.Value) string {
	var all []string
	for i := range v.NumField() {
		all = append(all, keyOf(v.Type().Field(i)))
	}
	return strings.Join(all, ", ")
}

// find returns a parameter below v, which is no part of a pattern, or a group of them.
func find(v reflect.Value, name string) (reflect.Value, error) {
	for left := name; ; {
		first, rest, more := strings.Cut(left, ".")
		f, ok := fieldOf(v, first)
		switch {
		case !ok:
			return f, fmt.Errorf("%s: there is no such parameter; there are %s", name, names(v))
		case !more:
			return f, nil
		case f.Kind() != reflect.Struct:
			return f, fmt.Errorf("%s: there is no such parameter; %s is no group of them", name, strings.TrimSuffix(name, "."+rest))
		}
		v, left = f, rest
	}
}

// Get returns the value of a parameter by its whole name.
func (p *Params) Get(name string) (string, bool) {
	if typ, field, ok := splitPattern(name); ok {
		q, there := p.Patterns[typ]
		f, is := fieldOf(reflect.ValueOf(&q).Elem(), field)
		if !there || !is {
			return "", false
		}
		return text(f), true
	}
	f, err := find(reflect.ValueOf(p).Elem(), name)
	if err != nil || f.Kind() == reflect.Struct || f.Kind() == reflect.Map {
		return "", false
	}
	return text(f), true
}

// Set gives a parameter, by its whole name, the value that a text says. A type of device that
// has no pattern of its own gets one, equal to that of AnyType but for the parameter. What
// cannot be a value is an error that names the parameter; what Validate refuses is not, for
// it may depend on what is set next.
func (p *Params) Set(name, value string) error {
	if typ, field, ok := splitPattern(name); ok {
		q, _ := p.pattern(typ)
		f, is := fieldOf(reflect.ValueOf(&q).Elem(), field)
		if !is {
			return fmt.Errorf("%s: there is no such parameter; patterns have %s", name, names(reflect.ValueOf(q)))
		}
		if err := parse(f, value); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if p.Patterns == nil {
			p.Patterns = map[string]Pattern{}
		}
		p.Patterns[typ] = q
		return nil
	}
	f, err := find(reflect.ValueOf(p).Elem(), name)
	if err != nil {
		return err
	}
	if err := parse(f, value); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// parse reads a value into a field.
func parse(f reflect.Value, value string) error {
	value = strings.TrimSpace(value)
	switch to := f.Addr().Interface().(type) {
	case *string:
		*to = value
	case *time.Duration:
		d, err := time.ParseDuration(value)
		if err != nil {
			return fmt.Errorf("%q is not a time such as 90s, 10m or 1h30m", value)
		}
		*to = d
	case *config.Size:
		n, err := config.ParseSize(value)
		if err != nil {
			return err
		}
		*to = n
	case *[]config.Size:
		var all []config.Size
		for _, word := range strings.FieldsFunc(strings.Trim(value, "[]"), func(r rune) bool { return r == ',' || r == ' ' }) {
			n, err := config.ParseSize(word)
			if err != nil {
				return err
			}
			all = append(all, n)
		}
		*to = all
	case *int:
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", value)
		}
		*to = n
	case *float64:
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return fmt.Errorf("%q is not a number", value)
		}
		*to = n
	default:
		return fmt.Errorf("it is a group of parameters and has no value of its own")
	}
	return nil
}

// Reset makes parameters what they are by default, by their whole names; the name of a group,
// as in "budget", is all of them. A pattern that there is not by default, as in
// "patterns.sata", is taken away: its devices have that of AnyType then. No name is
// everything.
func (p *Params) Reset(names ...string) error {
	def := Defaults()
	if len(names) == 0 {
		*p = def
		return nil
	}
	for _, name := range names {
		typ, field, ok := splitPattern(name)
		if !ok {
			f, err := find(reflect.ValueOf(p).Elem(), name)
			if err != nil {
				return err
			}
			d, _ := find(reflect.ValueOf(&def).Elem(), name) // it is there, too
			f.Set(d)
			continue
		}
		q, there := p.Patterns[typ]
		d, is := def.Patterns[typ]
		switch {
		case !there:
			return fmt.Errorf("%s: the class of devices %q has no pattern of its own", name, typ)
		case field == "" && is:
			p.Patterns[typ] = d
		case field == "":
			delete(p.Patterns, typ)
		default:
			d, _ = def.pattern(typ)
			f, _ := fieldOf(reflect.ValueOf(&q).Elem(), field)
			from, _ := fieldOf(reflect.ValueOf(&d).Elem(), field)
			f.Set(from)
			p.Patterns[typ] = q
		}
	}
	return nil
}

// Effect is Diff for what counts: a type of device without a pattern of its own has that of
// AnyType, so that giving it one is as many changes as it has other values.
func Effect(before, after Params) []Change {
	a, b := before.Clone(), after.Clone()
	for _, typ := range slices.Concat(slices.Collect(maps.Keys(a.Patterns)), slices.Collect(maps.Keys(b.Patterns))) {
		for _, p := range []*Params{&a, &b} {
			if _, ok := p.Patterns[typ]; !ok {
				p.Patterns[typ], _ = p.pattern(typ)
			}
		}
	}
	return Diff(a, b)
}

// Point shows where in the text of the rule the error is: the line, and a mark below it.
func (e *RuleError) Point(text string) string {
	lines := strings.Split(text, "\n")
	if e.Line < 1 || e.Line > len(lines) {
		return ""
	}
	line := []rune(lines[e.Line-1])
	mark := make([]rune, min(max(e.Column-1, 0), len(line)))
	for i := range mark {
		if mark[i] = ' '; line[i] == '\t' {
			mark[i] = '\t' // as wide as above
		}
	}
	return string(line) + "\n" + string(mark) + "^"
}

// Assignment gives a parameter a value, both as Set takes them.
type Assignment struct{ Name, Value string }

// Assignments reads the text of parameters, YAML or JSON, of which any may be left out, as
// what Set is to be told, in the order of their names. It knows nothing of which there are.
func Assignments(b []byte) (out []Assignment, err error) {
	var top map[string]any
	if err := yaml.Unmarshal(b, &top); err != nil {
		return nil, err
	}
	var visit func(name string, v any) error
	visit = func(name string, v any) error {
		switch v := v.(type) {
		case map[string]any:
			for _, k := range slices.Sorted(maps.Keys(v)) {
				if err := visit(join(name, k), v[k]); err != nil {
					return err
				}
			}
			return nil
		case []any:
			var all []string
			for _, w := range v {
				all = append(all, fmt.Sprint(w))
			}
			out = append(out, Assignment{name, strings.Join(all, ",")})
		case nil:
			out = append(out, Assignment{name, ""})
		case string, bool, int64, uint64, float64:
			out = append(out, Assignment{name, fmt.Sprint(v)})
		default:
			return fmt.Errorf("%s: %v is no value of a parameter", name, v)
		}
		return nil
	}
	if err := visit("", top); err != nil {
		return nil, err
	}
	return out, nil
}
