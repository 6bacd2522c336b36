// Package stack has what devices that are made of other devices have in common: mirrors
// and the flash layer.
package stack
