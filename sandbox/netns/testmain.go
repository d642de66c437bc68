package netns

import (
	"fmt"
	"os"
)

// TestMain is the TestMain of packages whose tests need network namespaces: it runs the tests inside the enclosure, for root and for
// ordinary users, with the flags that go test passed.
//
//	func TestMain(m *testing.M) { netns.TestMain(m) }
func TestMain(m interface{ Run() int }) {
	Dispatch()
	if inside {
		os.Exit(m.Run())
	}
	code, err := Reenter(os.Args)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(code)
}
