// Package archtest holds the shape of the program: its tests fail when a
// package imports what it must not, and say why it must not. The table of
// layers is in layers_test.go; a new package needs one line there. Rules
// for files and for memory are in files_test.go and memory_test.go.
package archtest
