package cli

import (
	"cmp"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// read returns a page of the documentation.
func read(t *testing.T, page string) string {
	t.Helper()
	p, err := os.ReadFile("../../docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	return string(p)
}

func TestEveryCommandIsDocumented(t *testing.T) {
	page := read(t, "cli.md")
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" {
			return
		}
		if c.HasSubCommands() {
			for _, sub := range c.Commands() {
				visit(sub)
			}
			return
		}
		if !strings.Contains(page, "`"+c.CommandPath()) {
			t.Errorf("docs/cli.md lacks `%s`", c.CommandPath())
		}
	}
	visit(newRoot(&session{}))
}

func TestEverySettingIsDocumented(t *testing.T) {
	page := read(t, "operations.md")
	var visit func(reflect.Type)
	visit = func(typ reflect.Type) {
		for f := range fields(typ) {
			key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if key != "-" && !strings.Contains(page, "`"+key+"`") {
				t.Errorf("docs/operations.md lacks `%s` of %s", key, typ)
			}
			inner := f.Type
			for inner.Kind() == reflect.Slice || inner.Kind() == reflect.Map || inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			if inner.Kind() == reflect.Struct {
				visit(inner)
			}
		}
	}
	visit(reflect.TypeFor[config.Config]())
}

// Each parameter of the flash policy is described with its default.
func TestEveryFlashParameterIsDocumented(t *testing.T) {
	page := read(t, "flash.md")
	p := policy.Defaults()
	for _, q := range p.Parameters() {
		name := strings.Replace(q.Name, "patterns."+policy.AnyType+".", "patterns.CLASS.", 1)
		if row := fmt.Sprintf("| `%s` | %s | ", name, cmp.Or(q.Default, "none")); !strings.Contains(page, row) {
			t.Errorf("docs/flash.md lacks the row\n%s", row)
		}
	}
}

func fields(typ reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range typ.NumField() {
			if !yield(typ.Field(i)) {
				return
			}
		}
	}
}
