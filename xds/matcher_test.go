package xds

import (
	"math/rand"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestDecimalRangeIsExact(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	ranges := [][2]int{{1, 65535}, {1, 1}, {65535, 65535}, {8080, 8123}, {99, 101}, {9, 10}, {1000, 1999}, {1024, 65535}, {1, 5431}}
	for range 8 {
		a := 1 + r.Intn(65535)
		ranges = append(ranges, [2]int{a, a + r.Intn(65536-a)})
	}
	for _, fl := range ranges {
		re := regexp.MustCompile("^(?:" + strings.Join(decimalRange(fl[0], fl[1]), "|") + ")$")
		for n := range 65536 {
			if got, want := re.MatchString(strconv.Itoa(n)), fl[0] <= n && n <= fl[1]; got != want {
				t.Fatalf("range %v: %d matches %v: %v", fl, n, re, got)
			}
		}
	}
}
