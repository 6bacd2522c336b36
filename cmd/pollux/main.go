// Command pollux starts and manages a pair of storage guests.
package main

import (
	"os"

	"github.com/pollux-storage/pollux/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }
