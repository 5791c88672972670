# The steps of pip's output, a line each.
s/^ *Installing build dependencies: started/  fetching the build tools/p
s/^ *Getting requirements to build editable: started/  translating ext\/ to C/p
s/^ *Collecting \([^ ;]*\).*/  fetching \1/p
s/^ *Building editable for peerd.*: started/  compiling/p
s/^ *Installing collected packages.*/  installing/p
