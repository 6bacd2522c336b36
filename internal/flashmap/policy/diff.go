package policy

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Change is a parameter whose value is another one.
type Change struct {
	Name     string // as in "patterns.default.min_accesses"
	Old, New string // as people write them; empty where there is none
}

// Diff returns the parameters in which two values differ, in the order of their names.
func Diff(before, after Params) []Change {
	a, b := map[string]string{}, map[string]string{}
	flatten("", reflect.ValueOf(before), a)
	flatten("", reflect.ValueOf(after), b)
	var out []Change
	for name, old := range a {
		if b[name] != old {
			out = append(out, Change{name, old, b[name]})
		}
	}
	for name, value := range b {
		if _, ok := a[name]; !ok {
			out = append(out, Change{Name: name, New: value})
		}
	}
	slices.SortFunc(out, func(x, y Change) int { return cmp.Compare(x.Name, y.Name) })
	return out
}

// flatten puts each parameter below v into a map by its name.
func flatten(name string, v reflect.Value, to map[string]string) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
			flatten(join(name, key), v.Field(i), to)
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			flatten(join(name, k.String()), v.MapIndex(k), to)
		}
	default:
		to[name] = fmt.Sprint(v.Interface())
	}
}

func join(name, key string) string {
	if name == "" {
		return key
	}
	return name + "." + key
}
