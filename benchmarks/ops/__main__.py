from benchmarks.ops.run import main

main()
