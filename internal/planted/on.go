//go:build planted

package planted

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
)

// selected is the one fault that the program has, "" for none.
var selected atomic.Value

func init() {
	if err := Select(os.Getenv("POLLUX_PLANTED")); err != nil {
		panic(err)
	}
}

// Has reports whether the program has the fault now.
func Has(f Fault) bool { return selected.Load() == f }

// Select makes the program have the named fault and no other from now on; an
// empty name is a program without. What runs already may have seen the fault
// that was selected before, so it is called between two runs of a test.
func Select(name string) error {
	if name == "" {
		selected.Store(Fault(""))
		return nil
	}
	known := make([]string, 0, len(table))
	for _, i := range table {
		if i.Name == name {
			selected.Store(Fault(name))
			return nil
		}
		known = append(known, i.Name)
	}
	return fmt.Errorf("no planted fault is called %q; there are %s", name, strings.Join(known, ", "))
}

// Info describes a fault.
type Info struct {
	Name  string
	What  string // what is wrong, and which known kind of bug that is
	Where string // package and function
	Class string // what it endangers
}

// All returns the faults in the order of their places.
func All() []Info { return append([]Info(nil), table...) }
